"""The kernel of `streams.finish`: one program for some pixels of half the resolution and some channels.

All maps are channels_last, so a row of memory holds the channels of one pixel. A program of the high stream reads four
pixels of it, adds one pixel of the low one to each, and writes the four and their mean; a program of the low stream
treats one pixel. Sums are made in float32, in float64 for float64.
"""

# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.one_pass.activations_triton import activated

_TILE = 1024  # numbers of one map that a program treats


def finish(
    made: Tensor,
    both: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    beside_low: Tensor | None,
    then: str,
    has_extra: bool,
) -> tuple[Tensor, Tensor]:
    n, c_high, h, w = made.shape
    low_h, low_w = both.shape[-2:]
    c_low = both.shape[1] - (c_high if has_extra else 0)
    high = torch.empty_like(made, memory_format=torch.channels_last)
    of_stack = (n, c_high + c_low, low_h, low_w)
    stack = torch.empty(of_stack, dtype=made.dtype, device=made.device, memory_format=torch.channels_last)
    columns = min(128, triton.next_power_of_2(max(c_high, c_low)))
    rows = _TILE // columns
    blocks = triton.cdiv(c_high, columns) + triton.cdiv(c_low, columns)
    grid = (triton.cdiv(n * low_h * low_w, rows), blocks)
    torch.library.wrap_triton(_finish)[grid](
        made,
        both,
        made if bias is None else bias,
        made if beside is None else beside,
        made if beside_low is None else beside_low,
        high,
        stack,
        n * low_h * low_w,
        h,
        w,
        low_h,
        low_w,
        c_high,
        c_low,
        both.shape[1],
        0 if beside_low is None else beside_low.shape[1],
        has_extra=has_extra,
        has_bias=bias is not None,
        has_beside=beside is not None,
        then=then,
        rows=rows,
        columns=columns,
        number=tl.float64 if made.dtype == torch.float64 else tl.float32,
    )
    return high, stack


@triton.jit
def _finish(
    made,
    both,
    bias,
    beside,
    beside_low,
    high,
    stack,
    count,
    h,
    w,
    low_h,
    low_w,
    c_high,
    c_low,
    c_both,
    c_beside,
    has_extra: tl.constexpr,
    has_bias: tl.constexpr,
    has_beside: tl.constexpr,
    then: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    number: tl.constexpr,
):
    q = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None]
    block = tl.program_id(1)
    high_blocks = tl.cdiv(c_high, columns)
    c_stack = c_high + c_low
    if block < high_blocks:
        c = (block * columns + tl.arange(0, columns))[None, :]
        inside = (q < count) & (c < c_high)
        base = tl.zeros((rows, columns), number)
        if has_extra:
            base += tl.load(both + q.to(tl.int64) * c_both + c, inside, 0).to(number)
        if has_bias:
            base += tl.load(bias + c, c < c_high, 0).to(number)
        image, rest = q // (low_h * low_w), q % (low_h * low_w)
        i, j = rest // low_w * 2, rest % low_w * 2
        total = tl.zeros((rows, columns), number)
        for quarter in tl.static_range(4):
            y, x = i + quarter // 2, j + quarter % 2
            seen = inside & (y < h) & (x < w)
            at = ((image * h + y).to(tl.int64) * w + x) * c_high + c
            value = base + tl.load(made + at, seen, 0).to(number)
            if has_beside:
                value += tl.load(beside + at, seen, 0).to(number)
            value = activated(value, then)
            tl.store(high + at, value, seen)
            total += tl.where(seen, value, 0.0)
        pixels = tl.minimum(h - i, 2) * tl.minimum(w - j, 2)
        tl.store(stack + q.to(tl.int64) * c_stack + c, total / pixels, inside)
    else:
        c = ((block - high_blocks) * columns + tl.arange(0, columns))[None, :]
        inside = (q < count) & (c < c_low)
        value = tl.load(both + q.to(tl.int64) * c_both + (c_both - c_low) + c, inside, 0).to(number)
        if has_bias:
            value += tl.load(bias + c_high + c, c < c_low, 0).to(number)
        if has_beside:
            value += tl.load(beside_low + q.to(tl.int64) * c_beside + (c_beside - c_low) + c, inside, 0).to(number)
        tl.store(stack + q.to(tl.int64) * c_stack + c_high + c, activated(value, then), inside)
