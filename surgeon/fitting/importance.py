"""What an error in the output of a conv costs at the end of the network: a metric S (out, out) for each unit.

    S = E g gᵀ,   g = ∂ log p(c) / ∂ y

at every pixel of the conv's output y, with the class c drawn from the network's own scores p, is the Fisher information
of that output, averaged over pixels; no labels are used. Where the outputs are no class
scores, g is the gradient of their sum with random signs, of which E g gᵀ is the same as with all outputs, one by one.

Martens & Grosse 2015, K-FAC, arXiv:1503.05671, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.fitting.data import Data
from surgeon.fitting.processes import Processes
from surgeon.fitting.units import Unit
from surgeon.models.call import Inputs
from surgeon.models.sandbox import quietly
from surgeon.proof.distance import tensors

SHARE = 0.1  # of the mean of the diagonal that is added to it: what is not seen to matter still counts
_IMAGES = 1024  # that are looked at, at most
_AT_ONCE = 8  # images whose gradients are computed at once
_DRAWS = 2


def metrics(
    reference: nn.Module, units: Sequence[Unit], data: Data, seed: int, processes: Processes
) -> dict[str, Tensor]:
    """Give the metric of every unit, by path; none of those whose gradients are not known or not finite."""
    sums = {unit: torch.zeros(()).double() for unit in units}
    done = 0
    for i, batch in enumerate(data):
        for start in range(0, batch.count, _AT_ONCE):
            part = _rows(batch.inputs, batch.count, start)
            for unit, found in _gradients(reference, units, part, seed + 7919 * i + start):
                sums[unit] = sums[unit].to(found) + found
        done += batch.count
        if done >= _IMAGES:
            break
    made = {}
    for unit, found in sums.items():
        found = found if found.dim() else torch.zeros(len(unit.kernel), len(unit.kernel)).double()
        processes.add_([found])
        if bool(found.isfinite().all()) and bool(found.diagonal().mean() > 0):
            made[unit.path] = found / found.diagonal().mean() + SHARE * torch.eye(len(found)).to(found)
    return made


def _rows(inputs: Inputs, count: int, start: int) -> Inputs:
    """Take some images of a batch."""
    return inputs.map(lambda t: t[start : start + _AT_ONCE] if t.dim() and len(t) == count else t)


def _gradients(reference: nn.Module, units: Sequence[Unit], inputs: Inputs, seed: int) -> list[tuple[Unit, Tensor]]:
    """Give Σ g gᵀ of every unit."""
    outputs: list[tuple[Unit, Tensor]] = []

    def hook(unit: Unit) -> Any:
        def note(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            kept = out if out.requires_grad else out.detach().requires_grad_()
            outputs.append((unit, kept))
            return kept.clone()  # what follows may write on it

        return note

    hooks = [unit.original.register_forward_hook(hook(unit)) for unit in units]
    generator, found = torch.Generator().manual_seed(seed), []
    try:
        with quietly(seed), torch.enable_grad():
            made = [one for one in tensors(inputs.cast_for(reference).call(reference)) if one.requires_grad]
            for _ in range(_DRAWS if made else 0):
                loss = sum((_drawn(one, generator) for one in made), start=torch.zeros(()))
                grads = torch.autograd.grad(loss, [y for _, y in outputs], retain_graph=True, allow_unused=True)
                for (unit, _), grad in zip(outputs, grads, strict=True):
                    if grad is not None:
                        rows = grad.double().movedim(1, 0).flatten(1)
                        found.append((unit, rows @ rows.T))
    except RuntimeError:  # it has no gradients, or not these
        return []
    finally:
        for one in hooks:
            one.remove()
    return found


def _drawn(out: Tensor, generator: torch.Generator) -> Tensor:
    """A number whose gradient is that of the log-likelihood of drawn classes, or of a random sum of the outputs."""
    if out.dim() in (2, 4) and out.shape[1] > 1:
        scores = out.movedim(1, -1).flatten(0, -2).log_softmax(1)
        chosen = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(out.device)
        return scores.gather(1, chosen).sum().cpu()
    signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
    return (out * signs).sum().cpu()
