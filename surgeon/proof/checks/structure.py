"""structure: is every module of B built as the replay built it?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Structure(Question):
    """Every module has the replay's class, settings, hooks and constants: a fault that these inputs do not show."""

    name = "structure"
    place = 65
    asks = "storage"
    unit = "count"
    is_for_approximate = True

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        if (found := evidence.structure) is None:
            return
        says = "every module has the class, settings, hooks and constants of the replay's"
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            says = f"{next(iter(found.values()))}{more}"
        yield self.answer(len(found), 0, says)
