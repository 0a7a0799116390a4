"""blocks: where outputs alone cannot tell, does every block of the replay compute what A's computes?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import EPS64, Question
from surgeon.proof.distance import EXACT
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Blocks(Question):
    """‖replay's block(x) − A's block(x)‖ / ‖A's block(x)‖ ≤ 1e-10 in float64, each on the input of A's block.

    It is asked if one unit in the last place moves A's outputs further than that, or if A runs only in its own dtype.
    """

    name = "blocks"
    place = 20

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        exact = [run.exact for run in evidence.runs if run.exact is not None]
        if found := [one.blocks for one in exact if one.blocks is not None]:
            distance = f"relative L2 {max(found):.1e}, at most {EXACT:.0e}"
            says = f"block by block in float64, on the inputs of A's blocks: {distance}"
            yield self.answer(max(found), EXACT, says, noise=EPS64)
