"""mathematics: does the replay compute in float64 what A computes?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import EPS64, ONE_UNIT, Question
from surgeon.proof.distance import EXACT, excess
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Mathematics(Question):
    """‖replay(x) − A(x)‖ / ‖A(x)‖ ≤ 1e-10 in float64, output by output.

    In some networks one unit in the last place of the weights moves the outputs further than that, for example because
    they sort by numbers that are nearly equal. There the limit is m times that distance, and `blocks` is asked, too.
    """

    name = "mathematics"
    place = 10

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        exact = [run.exact for run in evidence.runs if run.exact is not None]
        known = [(one.outputs, one.limit) for one in exact if one.outputs is not None]
        if not known:
            return
        found, limit = max(known, key=lambda one: excess(*one))
        says = f"replayed in float64: relative L2 {found:.1e}, at most {limit:.0e}"
        if limit > EXACT:
            says += f" ({evidence.margin:g} × what {ONE_UNIT} does to A)"
        noise = EPS64 if limit <= EXACT else limit / evidence.margin
        yield self.answer(found, limit, says, noise=noise)
