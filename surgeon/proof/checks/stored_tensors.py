"""stored tensors: is every tensor of B the replay's, rounded once?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class StoredTensors(Question):
    """|B's number − the replay's, rounded| ≤ 1 unit in the last place, for every number that B stores, in A's dtype.

    Nearly all are equal, and those that are not have no common direction.
    """

    name = "stored tensors"
    place = 60
    asks = "storage"
    unit = "ulp"
    is_for_approximate = True

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if (stored := evidence.stored) is None:
            return
        largest = max((one.ulps for one in stored.values()), default=0.0)
        says = f"{len(stored)} stored tensors are the replay's, rounded once: worst {largest:.3g} ulp, at most 1"
        wrong = [key for key, one in stored.items() if one.is_wrong]
        if wrong:
            count = f"{len(wrong)} of {len(stored)}"
            says = f"{count} stored tensors are not the replay's, rounded once: worst {largest:.3g} ulp, at most 1"
        if wrong and largest <= 1:
            says = f"{len(wrong)} of {len(stored)} stored tensors are one unit in the last place off throughout"
            yield self.answer(len(wrong), 0, says, unit="count")
        else:
            yield self.answer(largest, 1, says, noise=0.5)  # the replay is rounded once
