"""finite: is there anything to compare in every output of A?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Finite(Question):
    """Every output of A holds a finite number, and one moves with the input or modules show what it hides.

    Otherwise nothing was compared. It is only listed if it fails.
    """

    name = "finite"
    place = 50
    asks = "arithmetic"
    unit = "count"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if blank := sum(run.blank for run in evidence.runs):
            yield self.answer(blank, 0, f"{blank} outputs of A hold no finite number, so they show nothing")
        shown = [run.gaps or len(run.flat) < run.outputs for run in evidence.runs if not run.is_probe]
        if evidence.stored is None and not all(shown):
            says = "no output of A moves with the input, and B has no module of the same name: nothing was compared"
            yield self.answer(1, 0, says)
