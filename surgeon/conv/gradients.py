"""The gradient of a conv's kernel, in whichever way is faster on the CPU.

    dF[o, c, i, j] = Σ_p dy[o, p] · x[c, s·p + d·(i, j) − padding]

For each tap this is one matrix product, dyᵀ·x over the pixels that the tap sees. In channels_last a row of memory holds
one pixel, and a column of taps at stride 1 sees whole rows of the map, so that nothing has to be copied for it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 512  # torch's own way takes as long as for about c_in·c_out/512 pixels, however few there are


class Moves(NamedTuple):
    """How a kernel moves over its input: all of a conv but its kernel."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def both(
    x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Give the gradients of input and kernel, those that are `wanted`."""
    for_x, for_kernel = wanted
    by_taps = for_kernel and _is_faster_by_taps(x, kernel, dy, moves)
    dx = dk = None
    if for_x or (for_kernel and not by_taps):
        dx, dk, _ = torch.ops.aten.convolution_backward(
            *(dy, x, kernel, None, moves.stride, moves.padding, moves.dilation, False, (0, 0), moves.groups),
            output_mask=(for_x, for_kernel and not by_taps, False),
        )
    return dx, of_kernel_by_taps(x, kernel, dy, moves) if by_taps else dk


def of_kernel_by_taps(x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves) -> Tensor:
    """Give the gradient of a kernel without groups, one matrix product for each tap; all maps are channels_last."""
    c_out, c_in, kh, kw = kernel.shape
    made = kernel.new_empty((c_out, kh, kw, c_in))
    maps, ends = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    if _sees_whole_rows(x, kernel, dy, moves):
        for i in range(kh):
            _by_rows(maps, ends, i * moves.dilation[0] - moves.padding[0], made[:, i, 0])
        return made.permute(0, 3, 1, 2)
    (ph, pw), (sh, sw), (dh, dw) = moves.padding, moves.stride, moves.dilation
    maps = F.pad(maps, (0, 0, pw, pw, ph, ph))
    (height, width), flat = ends.shape[1:3], ends.reshape(-1, c_out).t()
    for i, j in itertools.product(range(kh), range(kw)):
        top, left = i * dh, j * dw
        seen = maps[:, top : top + (height - 1) * sh + 1 : sh, left : left + (width - 1) * sw + 1 : sw]
        torch.mm(flat, seen.reshape(-1, c_in), out=made[:, i, j])
    return made.permute(0, 3, 1, 2)


def _by_rows(maps: Tensor, ends: Tensor, shift: int, out: Tensor) -> None:
    """Write Σ dyᵀ·x for one tap, which sees the row that lies `shift` below that of the output."""
    first, last = max(0, -shift), min(ends.shape[1], maps.shape[1] - shift)
    if first == 0 and last == ends.shape[1] == maps.shape[1]:
        torch.mm(ends.reshape(-1, ends.shape[-1]).t(), maps.reshape(-1, maps.shape[-1]), out=out)
        return
    out.zero_()
    if first < last:
        for image, end in zip(maps, ends, strict=True):
            rows, seen = end[first:last].flatten(0, 1), image[first + shift : last + shift].flatten(0, 1)
            out.addmm_(rows.t(), seen)


def _sees_whole_rows(x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves) -> bool:
    return kernel.shape[3] == 1 and moves.stride == (1, 1) and moves.padding[1] == 0 and x.shape[3] == dy.shape[3]


def _is_faster_by_taps(x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves) -> bool:
    if moves.groups != 1 or x.device.type != "cpu" or x.dtype not in {torch.float32, torch.float64} or not x.numel():
        return False
    if x.dtype != dy.dtype or not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, dy)):
        return False
    pixels = dy.numel() // dy.shape[1]
    return _sees_whole_rows(x, kernel, dy, moves) or pixels * _FEW <= kernel.shape[0] * kernel.shape[1]
