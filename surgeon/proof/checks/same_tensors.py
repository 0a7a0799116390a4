"""same tensors: if no replay proves B, are the tensors of modules that nobody has folded still A's?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class SameTensors(Question):
    """In modules of the same class: the same dtype, |B's number − A's| ≤ 1 unit in the last place, and no common shift.

    All weights one unit larger is no rounding.
    """

    name = "same tensors"
    place = 31
    asks = "storage"
    unit = "count"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if not evidence.same:
            return
        wrong = [key for key, one in evidence.same.items() if one.is_wrong]
        largest = max((one.ulps for one in evidence.same.values()), default=0.0)
        says = f"{len(evidence.same)} tensors of modules of the same class are A's: worst {largest:.3g} ulp, at most 1"
        if wrong:
            says = f"{len(wrong)} of {len(evidence.same)} tensors of modules of the same class are not A's: {wrong[0]}"
        yield self.answer(len(wrong), 0, says)
