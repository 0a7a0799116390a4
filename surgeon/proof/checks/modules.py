"""modules: does B compute what the replay computes with B's tensors?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import EPS64, Question
from surgeon.proof.distance import EXACT
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Modules(Question):
    """‖B(x) − replay with B's tensors(x)‖ / ‖the latter‖ ≤ 1e-10: then B's modules are the replay's, too."""

    name = "modules"
    place = 70
    asks = "storage"
    is_for_approximate = True

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if found := [run.modules for run in evidence.runs if run.modules is not None]:
            distance = f"relative L2 {max(found):.1e}, at most {EXACT:.0e}"
            says = f"the replay with B's tensors computes what B computes: {distance}"
            yield self.answer(max(found), EXACT, says, noise=EPS64)
