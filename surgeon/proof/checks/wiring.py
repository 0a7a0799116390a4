"""wiring: if no replay proves B, does the code between its modules do what A's does?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import EPS64, Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check
from surgeon.proof.wiring import OUTPUT


class Wiring(Question):
    """With every module's result replaced by A's, what reaches the next one, and the output, are A's to 1e-10."""

    name = "wiring"
    place = 33

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        found = {path: far for run in evidence.runs for path, far in (run.wiring or {}).items()}
        for run in evidence.runs:
            found |= {path: max(far, found[path]) for path, far in (run.wiring or {}).items()}
        if not found:
            return
        most = max(found.values())
        says = f"with A's result in place of every module's, the code between them does the same: {most:.1e}"
        if wrong := [path for path, far in found.items() if not far <= evidence.wired]:
            what = "the output" if wrong[0] == OUTPUT else f"what reaches {wrong[0]}"
            says = f"with A's result in place of every module's, {what} is {found[wrong[0]]:.1e} from A's"
        yield self.answer(most, evidence.wired, says, noise=max(EPS64, evidence.arithmetic))
