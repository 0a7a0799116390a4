"""The kernels of `normed_sum` and `normed`: one, two or three maps, what is added to them, and an activation.

A map is read as (outer, channels, inner): pixels and 1 in channels_last, images and h·w otherwise. Pixels are cut into
slices; a program sums one slice of one map for some channels, and a second, small kernel adds up what the slices gave,
always in the same order. Means, and squared distances from them, are merged as Chan et al. 1983 do it, so that a mean
which is large beside the deviation costs no digits. Sums are made in float32, in float64 for float64.

What is known of m maps after the forward pass is (4·m, channels): means, inverse deviations, what each map is
multiplied by, and what is added to it. In the backward pass an activation needs what it was given, which is computed
once more from the maps; of a ReLU, what it gave says enough.
"""

# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.one_pass.activations_triton import activated, through

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
        is_double = z.dtype == torch.float64
        self.sums = torch.float64 if is_double else torch.float32
        self.number: dict[str, Any] = {"number": tl.float64 if is_double else tl.float32}
        self.tile = self.number | {"rows": self.rows, "columns": self.columns}
        self.small = self.number | {"at_once": _AT_ONCE, "columns": self.columns}

    def empty(self, z: Tensor, *sizes: int) -> Tensor:
        return torch.empty((*sizes, self.channels), dtype=self.sums, device=z.device)


def forward(
    maps: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    momenta: list[float],
    eps: list[float],
    beside: Tensor | None,
    then: str,
) -> tuple[Tensor, Tensor]:
    """Give the activated sum, and what is known of the maps.

    `affine` is the scales and then the shifts, `running` the means and then the variances, which are updated.
    """
    count = len(maps)
    cut, launch = _Cut(maps[0], count), torch.library.wrap_triton
    pieces, known = cut.empty(maps[0], count, cut.slices, 2), cut.empty(maps[0], 4 * count)
    total = torch.empty_like(maps[0])
    launch(_measure)[(cut.blocks, cut.slices, count)](
        *_three(maps), pieces, *cut.shape, cut.slices, cut.steps, **cut.tile
    )
    launch(_settle)[(cut.blocks, count)](
        *(pieces, known, *_three(affine[:count]), *_three(affine[count:])),
        *(*_three(running[:count]), *_three(running[count:])),
        *(*_three(momenta), *map(_rest, _three(momenta)), *_three(eps), *map(_rest, _three(eps))),
        *(cut.pixels, cut.channels, cut.slices, cut.steps * cut.rows),
        **(cut.small | {"maps": count}),
    )
    launch(_add)[(cut.tiles, cut.blocks)](
        *(*_three(maps), maps[0] if beside is None else beside, known, total, *cut.shape),
        **(cut.tile | {"maps": count, "has_beside": beside is not None, "then": then}),
    )
    return total, known


def backward(
    dy: Tensor, maps: list[Tensor], known: Tensor, beside: Tensor | None, total: Tensor | None, then: str, more: bool
) -> tuple[list[Tensor], Tensor]:
    """Give the gradients of the maps, and (maps + 1, channels): those of the scales, and that of every shift.

    With `more`, the gradient of what is added is the last of the first. `total` is what the ReLUs gave.
    """
    count = len(maps)
    cut, launch = _Cut(maps[0], 1), torch.library.wrap_triton
    pieces, sums, factors = cut.empty(dy, cut.slices, count + 1), cut.empty(dy, count + 1), cut.empty(dy, 3 * count)
    grads = [torch.empty_like(maps[0]) for _ in range(count + more)]
    seen = (dy, *_three(maps), dy if beside is None else beside, dy if total is None else total, known)
    kind = {"maps": count, "has_beside": beside is not None, "then": then}
    launch(_reduce)[(cut.blocks, cut.slices)](*seen, pieces, *cut.shape, cut.steps, **(cut.tile | kind))
    launch(_share)[(cut.blocks,)](
        *(pieces, known, sums, factors, cut.pixels, cut.channels, cut.slices), **(cut.small | {"maps": count})
    )
    launch(_spread)[(cut.tiles, cut.blocks)](
        *(*seen, factors, *_three(grads[:count]), grads[-1], *cut.shape), **(cut.tile | kind | {"more": more})
    )
    return grads, sums


def _three(some: list[Any]) -> list[Any]:
    """Fill up to three, for kernels that take as many; the others are not read."""
    return (some * 3)[:3] if len(some) == 1 else (some + some)[:3]


def _rest(number: float) -> float:
    """What a number has beyond float32, in which Triton hands it on."""
    return number - float(struct.unpack("f", struct.pack("f", number))[0])


@triton.jit
def _places(p, c, channels, inner):
    """Where the numbers of some pixels and channels lie."""
    return (p // inner).to(tl.int64) * channels * inner + c.to(tl.int64) * inner + p % inner


@triton.jit
def _one_of(which, first, second, third, at, seen, number: tl.constexpr):
    """Read some numbers of one of three tensors."""
    if which == 0:
        value = tl.load(first + at, seen, 0).to(number)
    elif which == 1:
        value = tl.load(second + at, seen, 0).to(number)
    else:
        value = tl.load(third + at, seen, 0).to(number)
    return value


@triton.jit
def _before(
    first, second, third, beside, known, at, c, channels, seen, inside,
    maps: tl.constexpr, has_beside: tl.constexpr, number: tl.constexpr,
):  # fmt: skip
    """The sum of the normed maps and what is added to it, at some pixels."""
    value = (tl.load(first + at, seen, 0).to(number) - tl.load(known + c, inside, 0)) * tl.load(
        known + 2 * maps * channels + c, inside, 0
    ) + tl.load(known + 3 * maps * channels + c, inside, 0)
    for which in tl.static_range(1, maps):
        z = tl.load((second if which == 1 else third) + at, seen, 0).to(number)
        mean = tl.load(known + which * channels + c, inside, 0)
        factor = tl.load(known + (2 * maps + which) * channels + c, inside, 0)
        value += (z - mean) * factor + tl.load(known + (3 * maps + which) * channels + c, inside, 0)
    if has_beside:
        value += tl.load(beside + at, seen, 0).to(number)
    return value


@triton.jit
def _led_back(
    dy, first, second, third, beside, total, known, at, c, channels, seen, inside,
    maps: tl.constexpr, has_beside: tl.constexpr, then: tl.constexpr, number: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum, from that of what the activation gave."""
    d = tl.load(dy + at, seen, 0).to(number)
    if then == "relu" or then == "relu6":
        d = through(d, tl.load(total + at, seen, 0).to(number), then)
    elif then != "":
        x = _before(first, second, third, beside, known, at, c, channels, seen, inside, maps, has_beside, number)
        d = tl.where(seen, through(d, x, then), 0.0)
    return d


@triton.jit
def _measure(
    first, second, third, pieces, pixels, channels, inner, slices, steps,
    number: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared distances from it, of one slice of one map."""
    part, which = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    count = tl.zeros((columns,), number)
    mean, apart = tl.zeros((columns,), number), tl.zeros((columns,), number)
    for step in range(steps):
        start = (part * steps + step) * rows
        more = tl.maximum(tl.minimum(rows, pixels - start), 0).to(number)
        p = (start + tl.arange(0, rows))[:, None]
        seen = (p < pixels) & (c < channels)[None, :]
        z = _one_of(which, first, second, third, _places(p, c[None, :], channels, inner), seen, number)
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
    pieces, known, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2, mean_0, mean_1, mean_2, var_0, var_1, var_2,
    momentum_0, momentum_1, momentum_2, rest_of_momentum_0, rest_of_momentum_1, rest_of_momentum_2,
    eps_0, eps_1, eps_2, rest_of_eps_0, rest_of_eps_1, rest_of_eps_2, pixels, channels, slices, size,
    maps: tl.constexpr, number: tl.constexpr, at_once: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Merge the slices of one map, update its running statistics, and find what it is multiplied by."""
    which = tl.program_id(1)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = c < channels
    mean, var = _merged(pieces + which.to(tl.int64) * slices * 2 * channels, pixels, channels, slices, size, c,
                        number, at_once, columns)  # fmt: skip
    eps = tl.where(which == 0, eps_0, tl.where(which == 1, eps_1, eps_2)).to(number)
    eps += tl.where(which == 0, rest_of_eps_0, tl.where(which == 1, rest_of_eps_1, rest_of_eps_2)).to(number)
    momentum = tl.where(which == 0, momentum_0, tl.where(which == 1, momentum_1, momentum_2)).to(number)
    momentum += tl.where(
        which == 0, rest_of_momentum_0, tl.where(which == 1, rest_of_momentum_1, rest_of_momentum_2)
    ).to(number)
    inverse = 1 / tl.sqrt(var + eps)
    tl.store(known + which * channels + c, mean, inside)
    tl.store(known + (maps + which) * channels + c, inverse, inside)
    factor = _one_of(which, scale_0, scale_1, scale_2, c, inside, number) * inverse
    tl.store(known + (2 * maps + which) * channels + c, factor, inside)
    shift = _one_of(which, shift_0, shift_1, shift_2, c, inside, number)
    tl.store(known + (3 * maps + which) * channels + c, shift, inside)
    own_mean = _one_of(which, mean_0, mean_1, mean_2, c, inside, number) * (1 - momentum) + mean * momentum
    total = tl.cast(pixels, number)
    unbiased = var * (total / (total - 1))
    own_var = _one_of(which, var_0, var_1, var_2, c, inside, number) * (1 - momentum) + unbiased * momentum
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
def _merged(
    pieces, pixels, channels, slices, size, c, number: tl.constexpr, at_once: tl.constexpr, columns: tl.constexpr
):
    """Mean and variance of one map from those of its slices."""
    mean, apart = tl.zeros((columns,), number), tl.zeros((columns,), number)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        share = tl.maximum(tl.minimum(size, pixels - s * size), 0).to(number) / pixels
        mean += tl.sum(tl.load(pieces + s.to(tl.int64) * 2 * channels + c[None, :], seen, 0) * share, 0)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        share = tl.maximum(tl.minimum(size, pixels - s * size), 0).to(number) / pixels
        here = pieces + s.to(tl.int64) * 2 * channels + c[None, :]
        off = tl.load(here, seen, 0) - mean[None, :]
        apart += tl.sum(tl.where(seen, off * off * share + tl.load(here + channels, seen, 0) / pixels, 0.0), 0)
    return mean, apart


@triton.jit
def _add(
    first, second, third, beside, known, total, pixels, channels, inner, maps: tl.constexpr, has_beside: tl.constexpr,
    then: tl.constexpr, number: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write the sum of the normed maps, activated."""
    p = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None]
    c = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    inside, at = c < channels, _places(p, c, channels, inner)
    seen = (p < pixels) & inside
    value = _before(first, second, third, beside, known, at, c, channels, seen, inside, maps, has_beside, number)
    tl.store(total + at, activated(value, then), seen)


@triton.jit
def _reduce(
    dy, first, second, third, beside, total, known, pieces, pixels, channels, inner, steps, maps: tl.constexpr,
    has_beside: tl.constexpr, then: tl.constexpr, number: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Sums over one slice of the gradient of the sum, and of it times each map without its mean."""
    part = tl.program_id(1)
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside, row = c < channels, c[None, :]
    mean_0 = tl.load(known + c, inside, 0)[None, :]
    mean_1 = tl.load(known + (maps > 1) * channels + c, inside, 0)[None, :]
    mean_2 = tl.load(known + (maps > 2) * 2 * channels + c, inside, 0)[None, :]
    sum_0, sum_1 = tl.zeros((columns,), number), tl.zeros((columns,), number)
    sum_2, sum_dy = tl.zeros((columns,), number), tl.zeros((columns,), number)
    for step in range(steps):
        p = ((part * steps + step) * rows + tl.arange(0, rows))[:, None]
        seen, at = (p < pixels) & inside[None, :], _places(p, row, channels, inner)
        d = _led_back(dy, first, second, third, beside, total, known, at, row, channels, seen, inside[None, :],
                      maps, has_beside, then, number)  # fmt: skip
        sum_dy += tl.sum(d, 0)
        sum_0 += tl.sum(d * (tl.load(first + at, seen, 0).to(number) - mean_0), 0)
        if maps > 1:
            sum_1 += tl.sum(d * (tl.load(second + at, seen, 0).to(number) - mean_1), 0)
        if maps > 2:
            sum_2 += tl.sum(d * (tl.load(third + at, seen, 0).to(number) - mean_2), 0)
    here = pieces + part.to(tl.int64) * (maps + 1) * channels + c
    tl.store(here, sum_0, inside)
    if maps > 1:
        tl.store(here + channels, sum_1, inside)
    if maps > 2:
        tl.store(here + 2 * channels, sum_2, inside)
    tl.store(here + maps * channels, sum_dy, inside)


@triton.jit
def _share(
    pieces, known, sums, factors, pixels, channels, slices, maps: tl.constexpr,
    number: tl.constexpr, at_once: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Add up the slices, and find what dz = a·dy − b·(z − μ) − d is made of for each map."""
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = c < channels
    sum_dy = _added(pieces + maps * channels, channels, slices, c, maps, number, at_once, columns)
    tl.store(sums + maps * channels + c, sum_dy, inside)
    for which in tl.static_range(maps):
        inverse = tl.load(known + (maps + which) * channels + c, inside, 0)
        dscale = _added(pieces + which * channels, channels, slices, c, maps, number, at_once, columns) * inverse
        tl.store(sums + which * channels + c, dscale, inside)
        factor = tl.load(known + (2 * maps + which) * channels + c, inside, 0)
        along = factor * inverse * dscale / pixels
        tl.store(factors + 3 * which * channels + c, factor, inside)
        tl.store(factors + (3 * which + 1) * channels + c, along, inside)
        tl.store(factors + (3 * which + 2) * channels + c, factor * sum_dy / pixels, inside)


@triton.jit
def _added(
    pieces, channels, slices, c, maps: tl.constexpr, number: tl.constexpr, at_once: tl.constexpr, columns: tl.constexpr
):
    total = tl.zeros((columns,), number)
    for begin in range(0, slices, at_once):
        s = (begin + tl.arange(0, at_once))[:, None]
        seen = (s < slices) & (c < channels)[None, :]
        total += tl.sum(tl.load(pieces + s.to(tl.int64) * (maps + 1) * channels + c[None, :], seen, 0), 0)
    return total


@triton.jit
def _spread(
    dy, first, second, third, beside, total, known, factors, grad_0, grad_1, grad_2, grad_beside,
    pixels, channels, inner, maps: tl.constexpr, has_beside: tl.constexpr, then: tl.constexpr, more: tl.constexpr,
    number: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the maps, and of what is added to them."""
    p = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None]
    c = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    inside, at = c < channels, _places(p, c, channels, inner)
    seen = (p < pixels) & inside
    d = _led_back(dy, first, second, third, beside, total, known, at, c, channels, seen, inside,
                  maps, has_beside, then, number)  # fmt: skip
    if more:
        tl.store(grad_beside + at, d, seen)
    for which in tl.static_range(maps):
        z = tl.load((first if which == 0 else second if which == 1 else third) + at, seen, 0).to(number)
        own = factors + 3 * which * channels + c
        z -= tl.load(known + which * channels + c, inside, 0)
        value = tl.load(own, inside, 0) * d - tl.load(own + channels, inside, 0) * z
        value -= tl.load(own + 2 * channels, inside, 0)
        tl.store((grad_0 if which == 0 else grad_1 if which == 1 else grad_2) + at, value, seen)
