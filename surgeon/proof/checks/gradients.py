"""gradients: are those of B A's, tensor by tensor?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question, of_steps
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Gradients(Question):
    """‖∇B − ∇A‖ / ‖∇A‖ ≤ 1e-10 in float64, for every input and every parameter that both have in the same role.

    They are gradients of one scalar, in which every number of every output has a random weight of its own.
    """

    name = "gradients"
    place = 84
    is_for_approximate = True  # then B is compared with the replay alone

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        for found, limit, says in of_steps(evidence.steps, "gradient"):
            yield self.answer(found, limit, says)
