"""The weights of another layer."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case, tensors_of
from surgeon.proof.report import Guess


class Elsewhere(Hypothesis):
    """What B has here is what is expected at another place."""

    place = 68

    def guess(self, case: Case) -> Iterator[Guess]:
        if not case.off:
            return
        shapes = {key: tensor.shape for key, tensor in case.wanted.items()}
        for path, module in case.others.items():
            if path == case.path or type(module) is not type(case.expected):
                continue
            theirs = tensors_of(module)
            if {key: tensor.shape for key, tensor in theirs.items()} != shapes:
                continue
            if (residual := case.explained(theirs)) is not None:
                yield case.guess(
                    "weights of another layer", f"B has the tensors of {path} here {close(residual)}", residual
                )
