"""finite: is there anything to compare in every output of A?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.report import Check
from surgeon.proof.runs import Evidence


class Finite(Question):
    """Every output of A holds a finite number, or else nothing can be compared there; it is only listed if it fails."""

    name = "finite"
    place = 50

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if blank := sum(run.blank for run in evidence.runs):
            yield self.answer(blank, 0, f"{blank} outputs of A hold no finite number, so they show nothing")
