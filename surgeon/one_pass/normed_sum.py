"""The sum of feature maps, each normed by its own batch: statistics, sum, and the gradients of both.

    y   = Σ γᵢ·(zᵢ − μᵢ)/σᵢ + βᵢ
    dβᵢ = Σ dy,   dγᵢ = Σ dy·(zᵢ − μᵢ)/σᵢ,   dzᵢ = γᵢ/σᵢ·(dy − dβᵢ/n − (zᵢ − μᵢ)/σᵢ·dγᵢ/n)

where sums without a limit are over the n pixels of a batch. On CUDA a Triton kernel reads each map once for the
statistics, once for the sum, and in the backward pass once for the sums and once for the gradients; step by step it is
twice as often, and once more for each sum of two maps. On the CPU torch's own norm is used: its passes are no slower.

Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Maybe = Tensor | None


class Statistics(NamedTuple):
    """What a norm is besides its scale and shift. `momentum` is the share of the new batch in the running ones."""

    mean: Tensor
    var: Tensor
    momentum: float
    eps: float


def forward(
    maps: Sequence[Tensor], scales: Sequence[Maybe], shifts: Sequence[Maybe], statistics: Sequence[Statistics]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sum the normed maps, and update the running statistics; also gives μᵢ and 1/σᵢ for the backward pass."""
    if maps[0].numel() == maps[0].shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {maps[0].shape}")
    total: Maybe = None
    means, inverses = [], []
    for z, scale, shift, own in zip(maps, scales, shifts, statistics, strict=True):
        y, mean, inverse = torch.native_batch_norm(z, scale, shift, own.mean, own.var, True, own.momentum, own.eps)
        total = y if total is None else total.add_(y)
        means.append(mean)
        inverses.append(inverse)
    assert total is not None
    return total, means, inverses


def backward(
    dy: Tensor,
    maps: Sequence[Tensor],
    scales: Sequence[Maybe],
    means: Sequence[Tensor],
    inverses: Sequence[Tensor],
    statistics: Sequence[Statistics],
    needs: Sequence[bool],
) -> tuple[list[Maybe], list[Maybe], list[Maybe]]:
    """Give the gradients of the maps that need one, of the scales, and of the shifts."""
    dmaps: list[Maybe] = []
    dscales: list[Maybe] = []
    dshifts: list[Maybe] = []
    for z, scale, mean, inverse, own, need in zip(maps, scales, means, inverses, statistics, needs, strict=True):
        dz, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            *(dy, z, scale, own.mean, own.var, mean, inverse, True, own.eps), output_mask=(need, True, True)
        )
        dmaps.append(dz if need else None)
        dscales.append(None if scale is None else dscale)
        dshifts.append(None if scale is None else dshift)
    return dmaps, dscales, dshifts
