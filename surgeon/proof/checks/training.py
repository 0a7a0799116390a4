"""training: in train mode, does B make of a batch what A does?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question, of_steps
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Outputs(Question):
    """‖B(x) − A(x)‖ / ‖A(x)‖ ≤ 1e-10 in float64 and train mode, with the same batch and the same random numbers.

    B is compared with the replay that has its tensors, and the replay with A; in eval mode other checks ask that.
    """

    name = "training"
    place = 80
    is_for_approximate = True  # then B is compared with the replay alone

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        steps = [step for step in evidence.steps if step.mode == "train"]
        for found, limit, says in of_steps(steps, "output", " in train mode"):
            yield self.answer(found, limit, says)
