"""The running statistics of batch norms, estimated anew on the images: of what goes through a network as it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import BatchNorm
from surgeon.conv.exact import Total
from surgeon.fitting.data import Data
from surgeon.fitting.processes import Processes
from surgeon.models.copies import in_mode
from surgeon.models.sandbox import quietly

_KEPT = ("running_mean", "running_var", "num_batches_tracked", "momentum")


def norms_in(model: nn.Module) -> list[Any]:
    """List the batch norms that keep statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and isinstance(m.running_mean, Tensor)]


def estimate_(model: nn.Module, data: Data, processes: Processes) -> Callable[[], None]:
    """Replace the statistics of all batch norms by their means over all batches; give what puts them back.

    Variances are those within batches, as in training.
    """
    norms = norms_in(model)
    before = [{name: _copied(getattr(norm, name)) for name in _KEPT} for norm in norms]
    modes = {module: module.training for module in model.modules()}

    def undo() -> None:
        for norm, kept in zip(norms, before, strict=True):
            _put_(norm, kept)

    try:
        in_mode(model, False)
        sums = _summed(model, norms, data, processes)
    finally:
        undo()
        for module, mode in modes.items():
            module.training = mode
    with torch.no_grad():
        for norm, (mean, var) in zip(norms, sums, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    return undo


def _summed(model: nn.Module, norms: list[Any], data: Data, processes: Processes) -> list[list[Tensor]]:
    """Give the mean statistics of every norm over all batches."""
    sums = [[Total(norm.running_mean) for _ in range(2)] for norm in norms]
    count = torch.zeros((), dtype=torch.float64, device=norms[0].running_mean.device)
    for norm in norms:
        norm.training, norm.momentum = True, 1.0  # the statistics are those of the batch
    with processes.agreeing():
        for _, batch in processes.batches(data):
            with quietly(0):
                batch.inputs.cast_for(model).call(model)
            count += 1
            for norm, (mean, var) in zip(norms, sums, strict=True):
                mean.add_(norm.running_mean.double())
                var.add_(norm.running_var.double())
    processes.add_([count])
    return [[one / count for one in processes.whole(pair)] for pair in sums]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _put_(norm: nn.Module, kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if isinstance(value, Tensor):
            getattr(norm, name).copy_(value)
        else:
            setattr(norm, name, value)
