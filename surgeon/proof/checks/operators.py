"""operators: is what was folded the same affine function as before, for every input?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import EPS64, Question
from surgeon.proof.distance import excess
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Operators(Question):
    """|replay's operator − A's| ≤ 1e-12 of the filter's largest number, for every part that was folded or swapped.

    The operators are recovered from impulses in all classes of borders (`proof.operators`), so what holds for them
    holds for every input. It is asked if the user wants a proof.
    """

    name = "operators"
    place = 15

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if (every := evidence.every_input) is None:
            return
        name, worst = max(every.parts.items(), key=lambda one: excess(one[1].found, one[1].limit))
        held = sum(one.holds for one in every.parts.values())
        count = f"{held} of {len(every.parts) + len(every.unknown)} folded parts"
        far = f"{worst.found:.1e} of a filter's largest number, at most {worst.limit:.0e}"
        says = f"{count} are equal for every input: worst {far}"
        if not worst.holds:
            says = f"{count} are equal for every input; {name} is not: {far}"
        yield self.answer(worst.found, worst.limit, says, noise=EPS64, unit="relative maximum")
