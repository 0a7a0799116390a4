"""The kernels of `normed_sum`, for three maps.

A map is read as (outer, channels, inner): pixels and 1 in channels_last, images and h·w otherwise. Pixels are cut into
slices; a program sums one slice of one map for some channels, and a second, small kernel adds up what the slices gave,
always in the same order. Means, and squared distances from them, are merged as Chan et al. 1983 do it, so that a mean
which is large beside the deviation costs no digits. Sums are made in float32.
"""

# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # numbers of one map that a program treats at once
_PROGRAMS = 1024  # so many keep a GPU busy
_AT_ONCE = 64  # slices that the second kernel reads at once


class _Cut:
    """How maps like `z` are cut: rows (pixels) and columns (channels) of a tile, tiles of a slice, slices."""

    def __init__(self, z: Tensor, launches: int) -> None:
        n, self.channels, h, w = z.shape
        self.inner = 1 if z.is_contiguous(memory_format=torch.channels_last) else h * w
        self.pixels = n * h * w
        self.columns = min(64, triton.next_power_of_2(self.channels)) if self.inner == 1 else 1
        self.rows = min(_TILE // self.columns, max(16, triton.next_power_of_2(self.pixels)))
        self.blocks = triton.cdiv(self.channels, self.columns)
        self.tiles = triton.cdiv(self.pixels, self.rows)
        self.steps = triton.cdiv(self.tiles, max(1, min(self.tiles, _PROGRAMS // (launches * self.blocks))))
        self.slices = triton.cdiv(self.tiles, self.steps)
        self.shape = (self.pixels, self.channels, self.inner)
        self.tile = {"rows": self.rows, "columns": self.columns}
        self.small = {"at_once": _AT_ONCE, "columns": self.columns}

    def empty(self, z: Tensor, *sizes: int) -> Tensor:
        return torch.empty((*sizes, self.channels), dtype=torch.float32, device=z.device)


def forward(
    maps: list[Tensor], affine: list[Tensor], running: list[Tensor], momenta: list[float], eps: list[float]
) -> tuple[Tensor, Tensor]:
    """Give the sum, and (6, channels): the three means, and the three inverse deviations.

    `affine` is three scales and three shifts, `running` three means and three variances, which are updated.
    """
    cut, launch = _Cut(maps[0], 3), torch.library.wrap_triton
    pieces, settled = cut.empty(maps[0], 3, cut.slices, 2), cut.empty(maps[0], 6)
    factors, total = cut.empty(maps[0], 6), torch.empty_like(maps[0])
    launch(_measure)[(cut.blocks, cut.slices, 3)](*maps, pieces, *cut.shape, cut.slices, cut.steps, **cut.tile)
    launch(_settle)[(cut.blocks, 3)](
        *(pieces, settled, factors, *affine, *running, *momenta, *eps),
        *(cut.pixels, cut.channels, cut.slices, cut.steps * cut.rows),
        **cut.small,
    )
    launch(_add)[(cut.tiles, cut.blocks)](*maps, settled, factors, total, *cut.shape, **cut.tile)
    return total, settled


def backward(
    dy: Tensor, maps: list[Tensor], scales: list[Tensor], settled: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of the three maps, and (4, channels): those of the scales, and that of every shift."""
    cut, launch = _Cut(maps[0], 1), torch.library.wrap_triton
    pieces, sums, factors = cut.empty(dy, cut.slices, 4), cut.empty(dy, 4), cut.empty(dy, 9)
    grads = [torch.empty_like(z) for z in maps]
    launch(_reduce)[(cut.blocks, cut.slices)](dy, *maps, settled, pieces, *cut.shape, cut.steps, **cut.tile)
    launch(_share)[(cut.blocks,)](
        *(pieces, settled, *scales, sums, factors, cut.pixels, cut.channels, cut.slices),
        **cut.small,
    )
    launch(_spread)[(cut.tiles, cut.blocks)](dy, *maps, settled, factors, *grads, *cut.shape, **cut.tile)
    return grads[0], grads[1], grads[2], sums


@triton.jit
def _places(p, c, channels, inner):
    """Where the numbers of some pixels and channels lie."""
    return (p // inner).to(tl.int64) * channels * inner + c.to(tl.int64) * inner + p % inner


@triton.jit
def _one_of(which, first, second, third, at, seen):
    """Read some numbers of one of three tensors."""
    if which == 0:
        value = tl.load(first + at, seen, 0).to(tl.float32)
    elif which == 1:
        value = tl.load(second + at, seen, 0).to(tl.float32)
    else:
        value = tl.load(third + at, seen, 0).to(tl.float32)
    return value


@triton.jit
def _measure(
    first, second, third, pieces, pixels, channels, inner, slices, steps, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """Mean, and sum of squared distances from it, of one slice of one map."""
    part, which = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    count = tl.zeros((columns,), tl.float32)
    mean, apart = tl.zeros((columns,), tl.float32), tl.zeros((columns,), tl.float32)
    for step in range(steps):
        start = (part * steps + step) * rows
        more = tl.maximum(tl.minimum(rows, pixels - start), 0).to(tl.float32)
        p = (start + tl.arange(0, rows))[:, None]
        seen = (p < pixels) & (c < channels)[None, :]
        z = _one_of(which, first, second, third, _places(p, c[None, :], channels, inner), seen)
        own = tl.sum(z, 0) / tl.maximum(more, 1)
        z = tl.where(seen, z - own[None, :], 0.0)
        off, share = own - mean, more / (count + tl.maximum(more, 1))
        mean += off * share
        apart += tl.sum(z * z, 0) + off * off * share * count
        count += more
    here = pieces + (which * slices + part).to(tl.int64) * 2 * channels + c
    tl.store(here, mean, c < channels)
    tl.store(here + channels, apart, c < channels)


@triton.jit
def _settle(
    pieces, settled, factors, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2, mean_0, mean_1, mean_2,
    var_0, var_1, var_2, momentum_0, momentum_1, momentum_2, eps_0, eps_1, eps_2, pixels, channels, slices, size,
    at_once: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Merge the slices of one map, update its running statistics, and find what it is multiplied by."""
    which = tl.program_id(1)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = c < channels
    mean, var = _merged(pieces + which.to(tl.int64) * slices * 2 * channels, pixels, channels, slices, size, c,
                        at_once, columns)  # fmt: skip
    eps = tl.where(which == 0, eps_0, tl.where(which == 1, eps_1, eps_2))
    momentum = tl.where(which == 0, momentum_0, tl.where(which == 1, momentum_1, momentum_2))
    inverse = 1 / tl.sqrt(var + eps)
    factor = _one_of(which, scale_0, scale_1, scale_2, c, inside) * inverse
    tl.store(settled + which * channels + c, mean, inside)
    tl.store(settled + (3 + which) * channels + c, inverse, inside)
    tl.store(factors + which * channels + c, factor, inside)
    tl.store(factors + (3 + which) * channels + c, _one_of(which, shift_0, shift_1, shift_2, c, inside), inside)
    own_mean = _one_of(which, mean_0, mean_1, mean_2, c, inside) * (1 - momentum) + mean * momentum
    unbiased = var * (pixels / (pixels - 1.0))
    own_var = _one_of(which, var_0, var_1, var_2, c, inside) * (1 - momentum) + unbiased * momentum
    if which == 0:
        tl.store(mean_0 + c, own_mean, inside)
        tl.store(var_0 + c, own_var, inside)
    elif which == 1:
        tl.store(mean_1 + c, own_mean, inside)
        tl.store(var_1 + c, own_var, inside)
    else:
        tl.store(mean_2 + c, own_mean, inside)
        tl.store(var_2 + c, own_var, inside)


@triton.jit
def _merged(pieces, pixels, channels, slices, size, c, at_once: tl.constexpr, columns: tl.constexpr):
    """Mean and variance of one map from those of its slices."""
    mean, apart = tl.zeros((columns,), tl.float32), tl.zeros((columns,), tl.float32)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        share = tl.maximum(tl.minimum(size, pixels - s * size), 0).to(tl.float32) / pixels
        mean += tl.sum(tl.load(pieces + s.to(tl.int64) * 2 * channels + c[None, :], seen, 0) * share, 0)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        share = tl.maximum(tl.minimum(size, pixels - s * size), 0).to(tl.float32) / pixels
        here = pieces + s.to(tl.int64) * 2 * channels + c[None, :]
        off = tl.load(here, seen, 0) - mean[None, :]
        apart += tl.sum(tl.where(seen, off * off * share + tl.load(here + channels, seen, 0) / pixels, 0.0), 0)
    return mean, apart


@triton.jit
def _add(
    first, second, third, settled, factors, total, pixels, channels, inner, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """Write the sum of the normed maps."""
    p = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None]
    c = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    inside, at = c < channels, _places(p, c, channels, inner)
    seen = (p < pixels) & inside
    value = tl.zeros((rows, columns), tl.float32)
    for which in tl.static_range(3):
        z = tl.load((first if which == 0 else second if which == 1 else third) + at, seen, 0).to(tl.float32)
        mean = tl.load(settled + which * channels + c, inside, 0)
        factor = tl.load(factors + which * channels + c, inside, 0)
        value += (z - mean) * factor + tl.load(factors + (3 + which) * channels + c, inside, 0)
    tl.store(total + at, value, seen)


@triton.jit
def _reduce(
    dy, first, second, third, settled, pieces, pixels, channels, inner, steps, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """Sums over one slice of dy, and of dy times each map without its mean."""
    part = tl.program_id(1)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = c < channels
    mean_0 = tl.load(settled + c, inside, 0)[None, :]
    mean_1 = tl.load(settled + channels + c, inside, 0)[None, :]
    mean_2 = tl.load(settled + 2 * channels + c, inside, 0)[None, :]
    sum_0, sum_1 = tl.zeros((columns,), tl.float32), tl.zeros((columns,), tl.float32)
    sum_2, sum_dy = tl.zeros((columns,), tl.float32), tl.zeros((columns,), tl.float32)
    for step in range(steps):
        p = ((part * steps + step) * rows + tl.arange(0, rows))[:, None]
        seen, at = (p < pixels) & inside[None, :], _places(p, c[None, :], channels, inner)
        d = tl.load(dy + at, seen, 0).to(tl.float32)
        sum_dy += tl.sum(d, 0)
        sum_0 += tl.sum(d * (tl.load(first + at, seen, 0).to(tl.float32) - mean_0), 0)
        sum_1 += tl.sum(d * (tl.load(second + at, seen, 0).to(tl.float32) - mean_1), 0)
        sum_2 += tl.sum(d * (tl.load(third + at, seen, 0).to(tl.float32) - mean_2), 0)
    here = pieces + part.to(tl.int64) * 4 * channels + c
    tl.store(here, sum_0, inside)
    tl.store(here + channels, sum_1, inside)
    tl.store(here + 2 * channels, sum_2, inside)
    tl.store(here + 3 * channels, sum_dy, inside)


@triton.jit
def _share(
    pieces, settled, scale_0, scale_1, scale_2, sums, factors, pixels, channels, slices,
    at_once: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Add up the slices, and find what dz = a·dy − b·(z − μ) − d is made of for each map."""
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = c < channels
    sum_dy = _added(pieces + 3 * channels, channels, slices, c, at_once, columns)
    tl.store(sums + 3 * channels + c, sum_dy, inside)
    for which in tl.static_range(3):
        inverse = tl.load(settled + (3 + which) * channels + c, inside, 0)
        dscale = _added(pieces + which * channels, channels, slices, c, at_once, columns) * inverse
        tl.store(sums + which * channels + c, dscale, inside)
        scale = scale_0 if which == 0 else scale_1 if which == 1 else scale_2
        factor = tl.load(scale + c, inside, 0).to(tl.float32) * inverse
        along = factor * inverse * dscale / pixels
        tl.store(factors + 3 * which * channels + c, factor, inside)
        tl.store(factors + (3 * which + 1) * channels + c, along, inside)
        tl.store(factors + (3 * which + 2) * channels + c, factor * sum_dy / pixels, inside)


@triton.jit
def _added(pieces, channels, slices, c, at_once: tl.constexpr, columns: tl.constexpr):
    total = tl.zeros((columns,), tl.float32)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        total += tl.sum(tl.load(pieces + s.to(tl.int64) * 4 * channels + c[None, :], seen, 0), 0)
    return total


@triton.jit
def _spread(
    dy, first, second, third, settled, factors, grad_0, grad_1, grad_2, pixels, channels, inner,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the three maps."""
    p = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None]
    c = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    inside, at = c < channels, _places(p, c, channels, inner)
    seen = (p < pixels) & inside
    d = tl.load(dy + at, seen, 0).to(tl.float32)
    for which in tl.static_range(3):
        z = tl.load((first if which == 0 else second if which == 1 else third) + at, seen, 0).to(tl.float32)
        own = factors + 3 * which * channels + c
        z -= tl.load(settled + which * channels + c, inside, 0)
        value = tl.load(own, inside, 0) * d - tl.load(own + channels, inside, 0) * z
        value -= tl.load(own + 2 * channels, inside, 0)
        tl.store((grad_0 if which == 0 else grad_1 if which == 1 else grad_2) + at, value, seen)
