"""A norm left in train mode: it uses the statistics of the batch at hand."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from surgeon.models.copies import duplicate
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess


class TrainMode(Hypothesis):
    """In train mode, the expected module gives what B gives in eval mode."""

    place = 40

    def guess(self, case: Case) -> Iterator[Guess]:
        sides = [case.expected, *([nn.Sequential(*case.origins)] if case.origins else [])]
        for module in sides:
            if not any(isinstance(getattr(one, "running_var", None), Tensor) for one in module.modules()):
                continue
            residual = case.made_by(duplicate(module).train())
            if residual is not None:
                says = "B's norm uses the statistics of the batch instead of its running ones, as in train mode"
                yield case.guess("train mode", f"{says}: that gives what B gives {close(residual)}", residual)
