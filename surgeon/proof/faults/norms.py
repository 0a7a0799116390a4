"""The numbers of a norm: running statistics of another time, a mean that is lost or has the wrong sign, γ, β."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_STATISTICS = {"running_mean", "running_var"}


class NormTensors(Hypothesis):
    """B's module is a norm, and one or two of its tensors are what such a mistake makes of the expected ones."""

    place = 65

    def guess(self, case: Case) -> Iterator[Guess]:
        wanted = case.wanted
        if not case.off or not wanted.keys() >= _STATISTICS or wanted["running_mean"].dim() != 1:
            return
        sigma = torch.sqrt(wanted["running_var"] + getattr(case.expected, "eps", 1e-5))
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        tried: list[tuple[str, str, dict[str, Tensor]]] = [
            ("mean lost", "its running mean is zero", {"running_mean": zero}),
            ("sign", "its running mean has the other sign", {"running_mean": -wanted["running_mean"]}),
            (
                "statistics",
                "its running statistics are those of a new norm",
                {"running_mean": zero, "running_var": one},
            ),
        ]
        if "weight" in wanted and "bias" in wanted:
            tried += [
                ("scale missing", "its γ is 1", {"weight": one}),
                ("scale missing", "its γ holds σ as well, which then cancels", {"weight": wanted["weight"] * sigma}),
                ("bias lost", "its β is zero", {"bias": zero}),
                ("sign", "its γ has the other sign", {"weight": -wanted["weight"]}),
            ]
        for kind, says, predicted in tried:
            if (residual := case.explained(predicted)) is not None:
                yield case.guess(kind, f"all is as expected of this norm, but {says} ({close(residual)})", residual)
        if case.off.keys() <= _STATISTICS:
            yield case.guess("statistics", _of_statistics(case))


def _of_statistics(case: Case) -> str:
    said = []
    for key, (wanted, held) in case.off.items():
        far = (held.double() - wanted).abs() > 4 * torch.finfo(case.dtype).eps * wanted.abs()
        said.append(f"{key} differs in {int(far.sum())} of {far.numel()} channels")
    return f"the running statistics are others, as of another time: {', '.join(said)}; γ, β and eps are as expected"
