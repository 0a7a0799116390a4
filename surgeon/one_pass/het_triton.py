"""The kernel of `het.convolve_op`: one program for some output pixels and some filters of a group.

In channels_last a row of memory holds the channels of one pixel. A program reads, for every tap off the centre, the
channels of its group at the pixels that the tap sees, and, for the centre, all channels; it multiplies each tile with
that of the kernel, and writes one tile. Every tap is multiplied once: 1/P + (1 − 1/P)/K² of the dense conv. Sums are
made in float32, in float64 for float64.
"""

# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _WIDE, _DEEP = 64, 64, 32  # pixels, filters and channels of a tile, at most; a product needs 16 of each


def convolve_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    channel_order: Tensor | None,
    filter_order: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Write the result into `y`, which is in channels_last."""
    n, c_in, h, w = x.shape
    c_out, per_in, kh, kw = weight.shape
    groups = c_in // per_in
    per_out = c_out // groups
    wide = min(_WIDE, max(16, triton.next_power_of_2(per_out)))
    deep = min(_DEEP, max(16, triton.next_power_of_2(per_in)))
    pixels = n * y.shape[2] * y.shape[3]
    blocks = triton.cdiv(per_out, wide)
    torch.library.wrap_triton(_convolve)[(triton.cdiv(pixels, _ROWS), groups * blocks)](
        *(x, weight, pointwise, x if bias is None else bias),
        *(x if one is None else one for one in (channel_order, filter_order)),
        *(y, pixels, h, w, y.shape[2], y.shape[3], c_in, c_out, per_in, per_out, blocks),
        *(weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)),
        *(*stride, *padding, *dilation),
        kh=kh,
        kw=kw,
        has_bias=bias is not None,
        is_ordered=channel_order is not None,
        number=tl.float64 if x.dtype == torch.float64 else tl.float32,
        precision="tf32" if x.dtype == torch.float32 and _rounds_as_convs_do() else "ieee",
        is_interpreted=not x.is_cuda,
        rows=_ROWS,
        wide=wide,
        deep=deep,
    )


def _rounds_as_convs_do() -> bool:
    """Whether torch's own convs of float32 multiply in TF32; where the user has said it in the newer way, exactly."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return False


@triton.jit
def _convolve(
    x, weight, pointwise, bias, channel_order, filter_order, y, pixels, h, w, out_h, out_w, c_in, c_out, per_in,
    per_out, blocks, at_filter, at_channel, at_row, at_column, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    kh: tl.constexpr, kw: tl.constexpr, has_bias: tl.constexpr, is_ordered: tl.constexpr, number: tl.constexpr,
    precision: tl.constexpr, is_interpreted: tl.constexpr, rows: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
):  # fmt: skip
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q = tl.program_id(0) * rows + tl.arange(0, rows)
    image, rest = q // (out_h * out_w), q % (out_h * out_w)
    top, left = rest // out_w * stride_h - pad_h, rest % out_w * stride_w - pad_w
    own = block * wide + tl.arange(0, wide)
    is_own, place = own < per_out, group * per_out + own
    total = tl.zeros((rows, wide), number)
    for tap in tl.static_range(kh * kw):
        i, j = tap // kw * dilation_h + top, tap % kw * dilation_w + left
        seen = (q < pixels) & (i >= 0) & (i < h) & (j >= 0) & (j < w)
        pixel = ((image * h + i).to(tl.int64) * w + j) * c_in
        is_centre: tl.constexpr = tap == kh // 2 * kw + kw // 2
        for begin in range(0, c_in if is_centre else per_in, deep):
            k = begin + tl.arange(0, deep)
            if is_centre:
                inside, c = k < c_in, k
                at = pointwise + place[None, :].to(tl.int64) * c_in + k[:, None]
            else:
                inside, c = k < per_in, group * per_in + k
                at = weight + place[None, :].to(tl.int64) * at_filter + k[:, None] * at_channel
                at += tap // kw * at_row + tap % kw * at_column
            if is_ordered:
                c = _within(tl.load(channel_order + c, inside, 0), c_in)
            values = tl.load(x + pixel[:, None] + c[None, :], seen[:, None] & inside[None, :], 0)
            taps = tl.load(at, inside[:, None] & is_own[None, :], 0)
            if is_interpreted:  # the interpreter multiplies bfloat16 bit patterns; products are exact in float32
                values, taps = values.to(number), taps.to(number)
            total += tl.dot(values, taps, out_dtype=number, input_precision=precision)
    if is_ordered:
        place = _within(tl.load(filter_order + place, is_own, 0), c_out)
    if has_bias:
        total += tl.load(bias + place, is_own, 0).to(number)[None, :]
    tl.store(y + q[:, None].to(tl.int64) * c_out + place[None, :], total, (q < pixels)[:, None] & is_own[None, :])


@triton.jit
def _within(place, count):
    """Keep to the memory of a map, whatever an order of channels says."""
    return tl.minimum(tl.maximum(place, 0), count - 1)
