"""statistics: do the running statistics follow a batch as A's do?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question, of_steps
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Statistics(Question):
    """Every buffer after a step, and how the step has moved it, to 1e-10: means, variances, counters of batches."""

    name = "statistics"
    place = 82
    is_for_approximate = True  # then B is compared with the replay alone

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        steps = [step for step in evidence.steps if step.mode == "train"]
        for found, limit, says in of_steps(steps, "statistic", " after a step"):
            yield self.answer(found, limit, says)
