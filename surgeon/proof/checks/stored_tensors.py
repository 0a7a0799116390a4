"""stored tensors: is every tensor of B the replay's, rounded once?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.report import Check
from surgeon.proof.runs import Evidence


class StoredTensors(Question):
    """|B's number − the replay's, rounded| ≤ 1 unit in the last place, for every number that B stores."""

    name = "stored tensors"
    place = 60
    is_for_approximate = True

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if (ulps := evidence.ulps) is None:
            return
        largest = max(ulps.values(), default=0.0)
        says = f"{len(ulps)} stored tensors are the replay's, rounded once: worst {largest:.3g} ulp, at most 1"
        if wrong := sum(value > 1 for value in ulps.values()):
            count = f"{wrong} of {len(ulps)}"
            says = f"{count} stored tensors are not the replay's, rounded once: worst {largest:.3g} ulp, at most 1"
        yield self.answer(largest, 1, says)
