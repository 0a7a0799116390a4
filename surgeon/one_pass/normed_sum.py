"""The sum of feature maps, each normed by its own batch: statistics, sum, and the gradients of both.

    y   = Σ γᵢ·(zᵢ − μᵢ)/σᵢ + βᵢ
    dβᵢ = Σ dy,   dγᵢ = Σ dy·(zᵢ − μᵢ)/σᵢ,   dzᵢ = γᵢ/σᵢ·(dy − dβᵢ/n − (zᵢ − μᵢ)/σᵢ·dγᵢ/n)

where sums without a limit are over the n pixels of a batch. For three maps on CUDA, Triton kernels read each map once
for its statistics and once for the sum, and in the backward pass each map and dy once for the sums and once for the
gradients; step by step dy is read three times as often, and two sums are written and read besides. Elsewhere torch's
own norm does it. (The kernels do the same for one map with what follows it, `normed`.)

Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgeon.one_pass import where

Maybe = Tensor | None


class Statistics(NamedTuple):
    """What a norm is besides its scale and shift. `momentum` is the share of the new batch in the running ones."""

    mean: Tensor
    var: Tensor
    momentum: float
    eps: float


def forward(
    maps: Sequence[Tensor], scales: Sequence[Maybe], shifts: Sequence[Maybe], statistics: Sequence[Statistics]
) -> tuple[Tensor, list[Tensor]]:
    """Sum the normed maps, and update the running statistics; also gives what `backward` has to know of them."""
    if maps[0].numel() == maps[0].shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {maps[0].shape}")
    affine = [t for t in (*scales, *shifts) if t is not None]
    running = [*(one.mean for one in statistics), *(one.var for one in statistics)]
    is_small = all(t.dtype != torch.float64 for t in (maps[0], *affine, *running))
    if len(maps) == 3 and len(affine) == 6 and is_small and has_kernel(maps, *affine, *running):
        momenta, eps = [one.momentum for one in statistics], [one.eps for one in statistics]
        y, settled = forward_op(list(maps), affine, running, momenta, eps, None, "")
        return y, [settled]
    total: Maybe = None
    known = []
    for z, scale, shift, own in zip(maps, scales, shifts, statistics, strict=True):
        y, *of_one = torch.native_batch_norm(z, scale, shift, own.mean, own.var, True, own.momentum, own.eps)
        total = y if total is None else total.add_(y)
        known += of_one
    assert total is not None
    return total, known


def backward(
    dy: Tensor,
    maps: Sequence[Tensor],
    scales: Sequence[Maybe],
    known: Sequence[Tensor],
    statistics: Sequence[Statistics],
    needs: Sequence[bool],
) -> tuple[list[Maybe], list[Maybe], list[Maybe]]:
    """Give the gradients of the maps that need one, of the scales, and of the shifts."""
    dmaps: list[Maybe] = []
    dscales: list[Maybe] = []
    dshifts: list[Maybe] = []
    if len(known) == 1:  # from the kernels
        found, sums = backward_op(in_format_of(dy, maps[0]), list(maps), known[0], None, None, "", False)
        dtypes = [scale.dtype for scale in scales if scale is not None]
        dscales = [sums[i].to(dtype) for i, dtype in enumerate(dtypes)]
        return list(found), dscales, [sums[-1].to(dtype, copy=True) for dtype in dtypes]
    for i, (z, scale, own, need) in enumerate(zip(maps, scales, statistics, needs, strict=True)):
        dz, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            *(dy, z, scale, own.mean, own.var, *known[2 * i : 2 * i + 2], True, own.eps), output_mask=(need, True, True)
        )
        dmaps.append(dz if need else None)
        dscales.append(None if scale is None else dscale)
        dshifts.append(None if scale is None else dshift)
    return dmaps, dscales, dshifts


def in_format_of(x: Tensor, z: Tensor) -> Tensor:
    """Lay a map out as another one, where it is not."""
    return x.contiguous(memory_format=torch.channels_last if _in_rows(z) else torch.contiguous_format)


def has_kernel(maps: Sequence[Tensor], *others: Tensor) -> bool:
    """Whether the kernels can treat maps, which lie alike, and others, with a number for each channel.

    Sums are made in float32, so float64 needs float64 everywhere.
    """
    first = maps[0]
    alike = all(z.dtype == first.dtype and z.shape == first.shape for z in maps)
    dense = all(map(_in_rows, maps)) or all(z.is_contiguous() for z in maps)
    known = {torch.float64} if first.dtype == torch.float64 else {torch.float32, torch.float16, torch.bfloat16}
    fits = all(t.dtype in known for t in (first, *others))
    ready = all(t.is_contiguous() for t in others)
    return alike and dense and fits and ready and where.uses_triton(*maps)


def _in_rows(z: Tensor) -> bool:
    return z.is_contiguous(memory_format=torch.channels_last)


def _forward(
    maps: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    momenta: list[float],
    eps: list[float],
    beside: Tensor | None,
    then: str,
) -> tuple[Tensor, Tensor]:
    from surgeon.one_pass import normed_sum_triton

    return normed_sum_triton.forward(maps, affine, running, momenta, eps, beside, then)


def _backward(
    dy: Tensor, maps: list[Tensor], known: Tensor, beside: Tensor | None, total: Tensor | None, then: str, more: bool
) -> tuple[list[Tensor], Tensor]:
    from surgeon.one_pass import normed_sum_triton

    return normed_sum_triton.backward(dy, maps, known, beside, total, then, more)


forward_op: Any = torch.library.triton_op(
    "surgeon::normed_sum",
    _forward,
    mutates_args=("running",),
    schema="(Tensor[] maps, Tensor[] affine, Tensor(a!)[] running, float[] momenta, float[] eps, Tensor? beside, "
    "str then) -> (Tensor, Tensor)",
)
backward_op: Any = torch.library.triton_op(
    "surgeon::normed_sum_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor[] maps, Tensor known, Tensor? beside, Tensor? total, str then, bool more)"
    " -> (Tensor[], Tensor)",
)


@forward_op.register_fake  # type: ignore[untyped-decorator]
def _shapes(
    maps: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    momenta: list[float],
    eps: list[float],
    beside: Tensor | None,
    then: str,
) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(maps[0].dtype, torch.float32)
    return torch.empty_like(maps[0]), maps[0].new_empty((4 * len(maps), maps[0].shape[1]), dtype=sums)


@backward_op.register_fake  # type: ignore[untyped-decorator]
def _backward_shapes(
    dy: Tensor, maps: list[Tensor], known: Tensor, beside: Tensor | None, total: Tensor | None, then: str, more: bool
) -> tuple[list[Tensor], Tensor]:
    grads = [torch.empty_like(maps[0]) for _ in range(len(maps) + more)]
    return grads, known.new_empty((len(maps) + 1, maps[0].shape[1]))
