"""Convs side by side, each with a batch norm in train mode, summed: one step of autograd with a backward of its own.

    y = Σ γᵢ·(zᵢ − μᵢ)/σᵢ + βᵢ,   zᵢ = Fᵢ∗xᵢ

There are fewer passes over the maps than step by step (`normed_sum`), gradients of kernels are computed the fastest way
(`conv.gradients`), and on a GPU less memory is taken: of the forward pass the inputs are kept, and the maps zᵢ of the
first branches. That of the last one, a strip with few taps, is made once more in the backward pass.

Ding et al. 2019, ACNet, arXiv:1908.03930, eq. 2–4; Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.conv import gradients
from surgeon.conv.gradients import Moves
from surgeon.one_pass import normed_sum
from surgeon.one_pass.normed_sum import Statistics

# Of how many branches the map between conv and norm is kept for the backward pass. On the CPU a strip that is made once
# more costs 5 % of a training step, and memory is seldom short; on a GPU it is memory that limits the batch.
KEPT = {"cpu": 3, "cuda": 2}


class Normed(NamedTuple):
    """One branch without its parameters: which of the inputs it reads, how its conv moves, and its norm."""

    source: int
    moves: Moves
    statistics: Statistics


def run(branches: Sequence[Normed], maps: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> Tensor:
    """Sum the branches; `parameters` are all kernels, then the scale of every norm, then every shift.

    Running statistics are updated as torch does it. Raises ValueError where a channel has a single number.
    """
    made: Tensor = _Sum.apply(tuple(branches), len(maps), *maps, *parameters)
    return made


def by_steps(branches: Sequence[Normed], maps: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> Tensor:
    """The same step by step, without running statistics, so that it can be differentiated any number of times."""
    n = len(branches)
    total: Tensor | None = None
    for one, kernel, scale, shift in zip(branches, parameters, parameters[n:], parameters[2 * n :], strict=False):
        z = _conv(maps[one.source], kernel, one.moves)
        y = F.batch_norm(z, None, None, scale, shift, training=True, eps=one.statistics.eps)
        total = y if total is None else total + y
    assert total is not None
    return total


def _conv(x: Tensor, kernel: Tensor | None, moves: Moves) -> Tensor:
    assert kernel is not None
    return F.conv2d(x, kernel, None, moves.stride, moves.padding, moves.dilation, moves.groups)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branches: tuple[Normed, ...], count: int, *given: Tensor | None) -> Tensor:
        maps, parameters, n = given[:count], given[count:], len(branches)
        kernels, scales, shifts = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
        pairs = zip(branches, kernels, strict=True)
        made = [_conv(_there(maps[one.source]), kernel, one.moves) for one, kernel in pairs]
        y, known = normed_sum.forward(made, scales, shifts, [one.statistics for one in branches])
        ctx.branches, ctx.count, ctx.known = branches, count, len(known)
        ctx.save_for_backward(*given, *known, *made[: KEPT[y.device.type]])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, branches, wanted = grads[0], ctx.branches, ctx.needs_input_grad[2:]
        n, saved = len(branches), ctx.saved_tensors
        given, rest = saved[: ctx.count + 3 * n], saved[ctx.count + 3 * n :]
        with torch.autocast(dy.device.type, enabled=False):
            if torch.is_grad_enabled():  # the gradients themselves are to be differentiated
                return None, None, *_again(branches, ctx.count, given, dy, wanted)
            maps, parameters = given[: ctx.count], given[ctx.count :]
            known, made = rest[: ctx.known], [*rest[ctx.known :]]
            for one, kernel in list(zip(branches, parameters, strict=False))[len(made) :]:
                made.append(_conv(maps[one.source], kernel, one.moves))
            needs = [wanted[one.source] or wanted[ctx.count + i] for i, one in enumerate(branches)]
            dmade, dscales, dshifts = normed_sum.backward(
                dy, made, parameters[n : 2 * n], known, [one.statistics for one in branches], needs
            )
            del made
            dmaps, dkernels = _through_convs(branches, maps, parameters[:n], dmade, wanted)
        return None, None, *dmaps, *dkernels, *dscales, *dshifts


def _through_convs(
    branches: Sequence[Normed],
    maps: Sequence[Tensor],
    kernels: Sequence[Tensor],
    dmade: list[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Give the gradients of the inputs, each summed over the branches that read it, and of the kernels."""
    dmaps: list[Tensor | None] = [None] * len(maps)
    dkernels: list[Tensor | None] = []
    for i, (one, kernel) in enumerate(zip(branches, kernels, strict=True)):
        dz, at = dmade[i], one.source
        dmade[i] = None  # free as soon as it has been used
        if dz is None:
            dkernels.append(None)
            continue
        dx, dk = gradients.both(maps[at], kernel, dz, one.moves, (wanted[at], wanted[len(maps) + i]))
        dkernels.append(dk)
        total = dmaps[at]
        if dx is not None:
            dmaps[at] = dx if total is None else total.add_(dx)
    return dmaps, dkernels


def _again(
    branches: Sequence[Normed], count: int, given: Sequence[Tensor | None], dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Give the gradients as a graph of torch's own steps."""
    asked = [t for t, is_wanted in zip(given, wanted, strict=True) if is_wanted and t is not None]
    y = by_steps(branches, [_there(t) for t in given[:count]], given[count:])
    found = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted and t is not None else None for t, is_wanted in zip(given, wanted, strict=True)]


def _there(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
