"""What an error in the output of a conv costs at the end of the network: a metric S (out, out) for each unit.

    S = E g gᵀ,   g = ∂ log p(c) / ∂ y

at every pixel of the conv's output y, with the class c drawn from the network's own scores p, is the Fisher information
of that output, averaged over pixels; no labels are used. Where the outputs are no class
scores, g is the gradient of their sum with random signs, of which E g gᵀ is the same as with all outputs, one by one.
What is drawn for an image depends on its number alone; so many images are looked at together as memory allows.

Martens & Grosse 2015, K-FAC, arXiv:1503.05671, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from surgeon.conv.exact import Total
from surgeon.fitting.data import Data
from surgeon.fitting.processes import Processes
from surgeon.fitting.units import Unit
from surgeon.models.call import Inputs
from surgeon.models.sandbox import quietly
from surgeon.proof.distance import tensors

SHARE = 0.1  # of the mean of the diagonal that is added to it: what is not seen to matter still counts
IMAGES = 1024  # that are looked at, at most
_AT_ONCE = 8  # images whose gradients are computed at once, at most
_BYTES = 2**28  # that autograd may keep for them
_DRAWS = 2


def metrics(
    reference: nn.Module, units: Sequence[Unit], data: Data, seed: int, processes: Processes
) -> dict[str, Tensor]:
    """Give the metric of every unit, by path; none of those whose gradients are not known or not finite."""
    sums = {unit: Total(unit.kernel.new_zeros(len(unit.kernel), len(unit.kernel))) for unit in units}
    before = itertools.accumulate(data.supply.counts, initial=0)  # images
    enough = next((i for i, count in enumerate(before) if count >= IMAGES), None)
    with processes.agreeing():
        at_once = 0
        for i, batch in processes.batches(data, enough):
            at_once = at_once or _images_at_once(reference, units, batch.inputs)
            for start in range(0, batch.count, at_once):
                part = batch.inputs.part(start, start + at_once)
                for unit, found in _gradients(reference, units, part, (seed, i, start)):
                    sums[unit].add_(found)
    made = {}
    for unit, found in zip(sums, processes.whole(list(sums.values())), strict=True):
        if bool(found.isfinite().all()) and bool(found.diagonal().mean() > 0):
            made[unit.path] = found / found.diagonal().mean() + SHARE * torch.eye(len(found)).to(found)
    return made


def _images_at_once(reference: nn.Module, units: Sequence[Unit], inputs: Inputs) -> int:
    """Say for how many images autograd keeps as much as it may, by what it keeps for one."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        _gradients(reference, units, inputs.batched(1), (0, 0, 0), draws=0)
    for parameter in reference.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return min(max(_BYTES // (sum(kept.values()) or 1), 1), _AT_ONCE)


def _gradients(
    reference: nn.Module, units: Sequence[Unit], inputs: Inputs, seed: tuple[int, int, int], draws: int = _DRAWS
) -> list[tuple[Unit, Tensor]]:
    """Give Σ g gᵀ of every unit."""
    outputs: list[tuple[Unit, Tensor]] = []

    def hook(unit: Unit) -> Any:
        def note(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            kept = out if out.requires_grad else out.detach().requires_grad_()
            outputs.append((unit, kept))
            return kept.clone()  # what follows may write on it

        return note

    hooks = [unit.original.register_forward_hook(hook(unit)) for unit in units]
    found = []
    try:
        with quietly(seed[0]), torch.enable_grad():
            made = [one for one in tensors(inputs.cast_for(reference).call(reference)) if one.requires_grad]
            for draw in range(draws if made else 0):
                terms = [_drawn(one, (*seed, draw, i)) for i, one in enumerate(made)]
                loss = sum(terms, start=torch.zeros(()))
                grads = torch.autograd.grad(
                    loss, [y for _, y in outputs], retain_graph=draw < draws - 1, allow_unused=True
                )
                for (unit, _), grad in zip(outputs, grads, strict=True):
                    if grad is not None:
                        rows = grad.movedim(1, 0).flatten(1).double()
                        found.append((unit, rows @ rows.T))
    except RuntimeError:  # it has no gradients, or not these
        return []
    finally:
        for one in hooks:
            one.remove()
    return found


def _drawn(out: Tensor, seed: tuple[int, ...]) -> Tensor:
    """A number whose gradient is that of the log-likelihood of drawn classes, or of a random sum of the outputs."""
    if out.dim() in (2, 4) and out.shape[1] > 1:
        scores = out.log_softmax(1)
        below = scores.detach().exp().double().cumsum(1) < _uniform(out[:, :1], seed)
        chosen = below.sum(1, keepdim=True).clamp_max(out.shape[1] - 1)
        return scores.gather(1, chosen).sum().cpu()
    signs = (_uniform(out, seed) < 0.5).to(out) * 2 - 1
    return (out * signs).sum().cpu()


def _uniform(like: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Draw from [0, 1), for each image by its own number: `seed` is that of the run, the batch, the first image, …"""
    run, batch, start, *which = seed
    made = torch.empty(like.shape, dtype=torch.float64)
    for i, row in enumerate(made if made.dim() else made[None]):
        number = hash((run, batch, start + i, *which)) % 2**63  # of whole numbers, so the same in every process
        row.uniform_(generator=torch.Generator().manual_seed(number))
    return made.to(like.device)
