"""other inputs: does B run wherever A does?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class OtherInputs(Question):
    """B takes two images of another size, and larger numbers, if A does; it is only listed if it fails."""

    name = "other inputs"
    place = 55
    asks = "arithmetic"
    unit = "count"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        for run in evidence.runs:
            if run.failed:
                yield self.answer(1, 0, f"A takes an input of {run.label}, and B does not: {run.failed}")
