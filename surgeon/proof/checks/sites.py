"""sites: if no replay proves B, does each of its modules make of A's input what A's does?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Sites(Question):
    """For every channel of every module that both have: its distance ≤ what rounding its weights does (see `isolated`).

    In half types an output hides what a module shows.
    """

    name = "sites"
    place = 32
    unit = "times"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if evidence.stored is not None:
            return
        found = {path: gap for run in evidence.runs for path, gap in run.gaps.items()}
        if not found:
            return
        worst: dict[str, float] = {}
        for run in evidence.runs:
            for path, gap in run.gaps.items():
                name = gap.culprit if gap.excess > 1 else path
                worst[name] = max(worst.get(name, 0.0), gap.excess)
        name, most = max(worst.items(), key=lambda item: item[1])
        wrong = sum(excess > 1 for excess in worst.values())
        says = f"{len(found)} modules, each on A's input: at most {most:.2g} of what rounding their weights explains"
        if wrong:
            far = f"{most:.2g} times" if most != float("inf") else "beyond"
            says = f"{wrong} of {len(found)} modules, each on A's input, are not A's: {name} is {far} what is allowed"
        yield self.answer(most, 1, says)
