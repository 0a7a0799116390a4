"""A feature map in two streams: some channels at full resolution, the rest at half of it. Tensors in, tensors out.

    split(x) = (x_high, pool(x_low)),   join(h, l) = x with x_high = h, x_low = up(l),   split(join(h, l)) = (h, l)

pool is 2×2 average pooling (at the border, over the pixels that a window has there), up repeats every pixel and crops
to the size of the high stream. Ranges, [start, stop) each, say which channels are low; after an octave conv there is
one range at the end, after a concatenation there are several.

These functions stand in rewritten graphs by their names (`analysis/program`), so a file may call them.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import sizes
from surgeon.conv.spec import is_channels_last

Ranges = tuple[tuple[int, int], ...]
Pair = tuple[Tensor, Tensor]


def last(alpha: float, channels: int) -> Ranges:
    """The last ⌊αC⌋ channels, as in the paper's code.

    >>> last(0.25, 10), last(0, 10)
    (((8, 10),), ())
    """
    low = math.floor(alpha * channels)
    return ((channels - low, channels),) if low else ()


def share(low: int, channels: int) -> float:
    """The share α with ⌊αC⌋ = low.

    >>> share(48, 104), last(share(48, 104), 104)
    (0.46153846153846156, ((56, 104),))
    >>> all(last(share(low, c), c) == ((c - low, c),) for c in range(2, 300) for low in range(1, c))
    True
    """
    alpha = low / channels
    return alpha if math.floor(alpha * channels) == low else math.nextafter(alpha, 1)


def count(ranges: Sequence[Sequence[int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def others(ranges: Sequence[Sequence[int]], channels: int) -> Ranges:
    """The channels that are in none of the ranges.

    >>> others(((2, 4), (6, 8)), 9)
    ((0, 2), (4, 6), (8, 9))
    """
    borders = [0, *itertools.chain.from_iterable(ranges), channels]
    return tuple((start, stop) for start, stop in zip(borders[::2], borders[1::2], strict=True) if stop > start)


def moved(ranges: Sequence[Sequence[int]], by: int) -> Ranges:
    """The same ranges after `by` other channels."""
    return tuple((start + by, stop + by) for start, stop in ranges)


def within(ranges: Sequence[Sequence[int]], start: int, stop: int) -> Ranges:
    """Those of the channels from `start` to `stop` that are in the ranges, counted from `start`.

    >>> within(((2, 4), (6, 8)), 3, 7)
    ((0, 1), (3, 4))
    """
    cut = ((max(first, start), min(last, stop)) for first, last in ranges)
    return tuple((first - start, last - start) for first, last in cut if first < last)


def merged(ranges: Sequence[Sequence[int]]) -> Ranges:
    """Join ranges that touch.

    >>> merged(((0, 2), (2, 4), (5, 6)))
    ((0, 4), (5, 6))
    """
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def numbers(ranges: Sequence[Sequence[int]], device: torch.device | None = None) -> Tensor:
    """List the channels in these ranges, in order.

    >>> numbers(((0, 2), (5, 6)))
    tensor([0, 1, 5])
    """
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


def take(x: Tensor, ranges: Sequence[Sequence[int]], dim: int = 1) -> Tensor:
    """The channels in these ranges, in order; a view where there is one range."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def part(x: Tensor, low: Sequence[Sequence[int]], dim: int = 1) -> tuple[Tensor, Tensor | None]:
    """The high channels, and the low ones if there are any.

    Where the low ones come last both are parts of one split, whose gradients are put together without filling in zeros.
    """
    channels = sizes(x)[dim]
    if not low:
        return x, None
    if len(low) == 1 and low[0][1] == channels:
        return cut(x, low[0][0], dim)
    return take(x, others(low, channels), dim), take(x, low, dim)


def cut(x: Tensor, at: int, dim: int = 1) -> Pair:
    """The channels before a place, and those from there on."""
    first, rest = torch.split(x, [at, sizes(x)[dim] - at], dim)
    return first, rest


def pool(x: Tensor) -> Tensor:
    """Halve the resolution by averages of 2×2 pixels, at the border of fewer; the result is ⌈h/2⌉ × ⌈w/2⌉."""
    if x.is_cuda and x.requires_grad and not torch.compiler.is_compiling() and has_whole_windows(x):
        made: Tensor = Pool.apply(x)
        return made
    return nn.functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


def has_whole_windows(x: Tensor) -> bool:
    """Whether every window of 2×2 pixels of a batch of maps is full."""
    return x.dim() == 4 and x.shape[-2] % 2 == 0 and x.shape[-1] % 2 == 0


class Pool(torch.autograd.Function):
    """Averages of whole windows of 2×2 pixels, with a gradient that is written in one pass.

    On CUDA, torch's own gradient of the pooling takes a fifth of a training step of an octave ResNet-50.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        n, c, h, w = dy.shape
        if is_channels_last(dy):
            rows = (dy * 0.25).permute(0, 2, 3, 1)[:, :, None, :, None, :]
            return rows.expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        return (dy * 0.25)[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


def up(x: Tensor, size: Sequence[int]) -> Tensor:
    """Double the resolution by repeating every pixel, and crop to (h, w); `pool` undoes it bit for bit.

    >>> up(torch.tensor([[[[1.0, 2.0]]]]), (2, 3))
    tensor([[[[1., 1., 2.],
              [1., 1., 2.]]]])
    """
    h, w = size
    if x.dim() == 3:
        return up(x[None], size)[0]
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest")[..., :h, :w]


def up_to(low: Tensor, high: Tensor) -> Tensor:
    """up(low) at the size of `high`."""
    return up(low, high.shape[-2:])


def lift_to(low: Tensor, high: Tensor) -> Tensor:
    """up(low), laid out in memory as it lies in join(high, low), so that sums over it run in the same order."""
    layout = torch.channels_last if is_channels_last(high) else torch.contiguous_format
    return up_to(low, high).contiguous(memory_format=layout)


def crop_to(fine: Tensor, high: Tensor) -> Tensor:
    """What is left of a map at the size of `high`, from the top left."""
    return fine[..., : high.shape[-2], : high.shape[-1]]


def halve_to(low: Tensor, high: Tensor) -> Tensor:
    """What is left of a low map at half the size of `high`, rounded up, from the top left."""
    return low[..., : -(-high.shape[-2] // 2), : -(-high.shape[-1] // 2)]


def add_into(x: Tensor, y: Tensor) -> Tensor:
    """x + y; in place where no gradient is asked for, so only for an x that nothing else reads.

    A sum that is larger than x, or that has another dtype, does not fit into x.
    """
    if not writes_in_place() or x.dtype != y.dtype:
        return x + y
    fits = x.shape == y.shape or torch.broadcast_shapes(x.shape, y.shape) == x.shape  # type: ignore[no-untyped-call]
    return x.add_(y) if fits else x + y


def cast_once(kernel: Tensor, x: Tensor) -> Tensor:
    """Cast a kernel as autocast would cast it, before it is cut: otherwise each of its parts is cast by itself."""
    place = x.device.type
    if not torch.amp.is_autocast_available(place) or not torch.is_autocast_enabled(place):
        return kernel
    return kernel.to(torch.get_autocast_dtype(place))


def writes_in_place() -> bool:
    """Whether writing into a tensor of one's own is allowed and pays: autograd keeps tensors, a compiler fuses sums.

    A trace would hold for the shapes that it was made with only.
    """
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_traced)


def add_up(high: Tensor, low: Tensor) -> Tensor:
    """high + up(low), without writing up(low); in place like `add_into`, so only for a high that nothing else reads.

    Every second row and column of `high` is a map of the size of `low`; in channels_last, with even sides, one addition
    does all four.
    """
    n, c, h, w = high.shape
    if not writes_in_place():
        return high + up(low, (h, w))
    if h % 2 == 0 and w % 2 == 0 and is_channels_last(high):
        quads = high.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c)
        quads.add_(low.permute(0, 2, 3, 1)[:, :, None, :, None, :])
        return high
    for i, j in itertools.product((0, 1), (0, 1)):
        quarter = high[..., i::2, j::2]
        quarter.add_(low[..., : quarter.shape[-2], : quarter.shape[-1]])
    return high


def raised(low: Tensor, beside: Tensor) -> Tensor:
    """up(low) + beside as a new map, in one pass where it can be: in channels_last, with even sides."""
    n, c, h, w = beside.shape
    if h % 2 or w % 2 or not is_channels_last(beside):
        return add_up(beside.clone(), low)
    quads = beside.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c)
    made = quads + low.permute(0, 2, 3, 1)[:, :, None, :, None, :]
    return made.view(n, h, w, c).permute(0, 3, 1, 2)


def split(x: Tensor, low: Sequence[Sequence[int]]) -> Pair:
    """(n, c, h, w) → (n, high, h, w) and (n, low, ⌈h/2⌉, ⌈w/2⌉); the same without n."""
    high, rest = part(x, low, _channel_axis(x))
    assert rest is not None
    return high, pool(rest)


def join(high: Tensor, low: Tensor, ranges: Sequence[Sequence[int]]) -> Tensor:
    """Put two streams into one map again: the inverse of `split` on what it gives.

    >>> join(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[7.0]]]]), [(1, 2)])[0]
    tensor([[[1., 2.]],
    <BLANKLINE>
            [[7., 7.]]])
    """
    return interleave(high, up_to(low, high), ranges)


def interleave(high: Tensor, low: Tensor, ranges: Sequence[Sequence[int]]) -> Tensor:
    """Put channels of the same resolution into their order; `low` are those in the ranges."""
    axis = _channel_axis(high)
    border = sizes(high)[axis]
    channels = border + sizes(low)[axis]
    if tuple(ranges[0]) == (border, channels):
        return torch.cat([high, low], axis)
    sources = {False: high, True: low}
    places = sorted([(start, stop, True) for start, stop in ranges] + [(*r, False) for r in others(ranges, channels)])
    done, parts = {True: 0, False: 0}, []
    for start, stop, is_low in places:
        parts.append(sources[is_low].narrow(axis, done[is_low], stop - start))
        done[is_low] += stop - start
    return torch.cat(parts, axis)


def _channel_axis(x: Tensor) -> int:
    """Where the channels are: a map (c, h, w) has no batch, such as positions that are added to every image."""
    return 0 if x.dim() == 3 else 1


def low_pass(x: Tensor, low: Sequence[Sequence[int]]) -> Tensor:
    """What is left of a map when some of its channels go through half the resolution: join(split(x))."""
    return join(*split(x, low), low)
