"""train settings: do norms and dropout have A's momentum, eps and probability, if no replay proves B?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class TrainSettings(Question):
    """Modules of the same name and class have the same settings, also where one batch would not show another one."""

    name = "train settings"
    place = 86
    asks = "storage"
    unit = "count"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if (found := evidence.settings) is None:
            return
        says = "norms and dropout have A's settings"
        if found:
            says = f"{next(iter(found.values()))}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
        yield self.answer(len(found), 0, says)
