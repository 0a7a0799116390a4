"""Do two affine modules compute the same for every map of every size? Both operators are recovered, and compared.

A module that is made of convolutions, fixed norms, padding and sums alone (`linearity`) is f(x) = f(0) + L·x, and L
is known once it is known what it makes of every impulse: an input that is 1 at one pixel of one channel, and else 0.

On an axis of n pixels L[p, q], what output p has of input q, is one of these, with the stride s:

    start:     p sees beyond the first pixel and not beyond the last. L depends on p and q alone.
    interior:  p sees no border. L depends on q − s·p alone.
    end:       p sees beyond the last pixel and not beyond the first. L depends on n − q, and on n − s·p.
    both:      the map is smaller than what p sees.

For the first three to be there, n ≥ reach + s is enough, and as many rows more as are cropped or mirrored. Where the
last output lies depends on n modulo s, so s sizes are taken on each axis, and all pairs of them: these frames hold
every corner, every edge and the interior, at every phase of the stride. A larger map has no others. On an axis that is
too small for `start` and `end` to be apart, a step puts the same two borders on one row: L is what both leave of the
interior, so modules that agree on the frames agree there, too.

All channels are tried in the frames, one after the other; channels of groups that do not see each other are tried at
once. Sizes below and one above are run beside that, on impulses of all channels at once.

Two operators are compared filter by filter, in float64:

    max |L_A − L_B|, |f_A(0) − f_B(0)|  ≤  1e-12 · max |L|, |f(0)|      of the same filter

Where numbers in A cancel, that is more than float64 can hold; so if it is exceeded, the numbers of A are moved by one
unit in their last place, and what that does to its operator, times 8, is the limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.models.copies import shadow
from surgeon.proof.linearity import NotLinearError, Trace, steps_of
from surgeon.proof.ulps import Jitter

LIMIT = 1e-12
_MOVES = 3  # times that the numbers of A are moved, where they cancel
_MARGIN = 8.0
_HOPELESS = 30.0  # times a limit: no further move makes up for it
_AT_ONCE = 2**19  # numbers that one chunk of impulses, or what comes of it, may have
_MOST = 2**30  # numbers that all impulses and what comes of them may have
_PROBES = (16, 32, 64, 128)
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError)  # of a user's code, too
_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two operators are apart, relative to the largest number of the filter, and how far they may be."""

    found: float
    limit: float = LIMIT

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


@dataclass(slots=True)
class _Filters:
    """The largest number of each filter, and the largest difference."""

    scale: Tensor
    apart: Tensor

    def see(self, apart: Tensor, size: Tensor | None) -> None:
        """Take note of differences (n, out, h, w), which are written over, and of numbers of that size.

        Raises:
            NotLinearError: they are not all finite.
        """
        dims = (0, 2, 3)
        self.apart = torch.maximum(self.apart, apart.abs_().amax(dims))
        if size is not None:
            self.scale = torch.maximum(self.scale, size.abs_().amax(dims))
        if not bool((self.apart + self.scale).isfinite().all()):
            raise NotLinearError("not all of its numbers are finite")

    @property
    def worst(self) -> float:
        differ = self.apart > 0
        return float((self.apart[differ] / self.scale[differ]).amax()) if differ.any() else 0.0


@dataclass(slots=True)
class _Pair:
    """Two modules that read maps of so many channels."""

    sides: tuple[nn.Module, nn.Module]
    channels: int
    device: torch.device
    wraps: bool  # padding that shows the other border
    filters: _Filters | None = field(default=None)

    def zeros(self, count: int, size: _Size) -> Tensor:
        return torch.zeros(count, self.channels, *size, dtype=torch.float64, device=self.device)

    def run(self, side: nn.Module, x: Tensor, lone: int = 0) -> tuple[Tensor, Trace]:
        return steps_of(side, x.clone(), lone=lone, wraps=self.wraps)

    def both(self, x: Tensor, lone: int = 0) -> tuple[Tensor, Tensor] | None:
        """Run both, or neither: None where neither takes such a map.

        Raises:
            _ApartError: one takes it and the other does not, or they give maps of different sizes.
        """
        made: list[Tensor] = []
        for side in self.sides:
            try:
                made.append(self.run(side, x, lone)[0])
            except _REFUSALS:
                continue
        if not made:
            return None
        if len(made) == 1 or made[0].shape != made[1].shape:
            raise _ApartError
        return made[0], made[1]


class _ApartError(Exception):
    """The two give maps of different sizes."""


def compare(one: nn.Module, other: nn.Module, channels: int, device: torch.device) -> Agreement:
    """Compare the operators of two modules that read maps of so many channels; both are in float64 and in eval mode.

    Raises:
        NotLinearError: it is not known of both that they are affine, or there are too many numbers.
    """
    found = _apart(one, other, channels, device)
    if found <= LIMIT or math.isinf(found):
        return Agreement(found)
    limit = LIMIT
    for i in range(_MOVES):
        limit = max(limit, _MARGIN * _apart(one, shadow(one, Jitter(i)).eval(), channels, device))
        if not limit < found < _HOPELESS * limit:
            break
    return Agreement(found, limit)


def _apart(one: nn.Module, other: nn.Module, channels: int, device: torch.device) -> float:
    wraps = any(_mirrors(module) for side in (one, other) for module in side.modules())
    pair = _Pair((one, other), channels, device, wraps)
    traces = [_look(pair, side) for side in pair.sides]
    if traces[0].jump != traces[1].jump:
        return math.inf
    sizes = _sizes(traces, wraps=wraps)
    groups = math.gcd(traces[0].groups, traces[1].groups) or channels
    try:
        for rows, columns in itertools.product(*sizes):
            _all_channels(pair, (rows, columns), groups)
        assert pair.filters is not None
        for size in _beside(sizes, max(*traces[0].reach, *traces[1].reach)):
            _channels_at_once(pair, size, groups, is_larger=size[0] >= sizes[0].stop)
    except _ApartError:
        return math.inf
    return pair.filters.worst


def _look(pair: _Pair, side: nn.Module) -> Trace:
    """Run one side on a map without numbers, and say how it depends on it."""
    for n in _PROBES:
        try:
            return pair.run(side, pair.zeros(1, (n, n + 1)))[1]
        except _REFUSALS:  # a map that is too small, say
            continue
    raise NotLinearError("it does not run by itself on any map that was tried")


def _sizes(traces: list[Trace], *, wraps: bool) -> list[range]:
    """Give, for each axis, the sizes that hold all classes of borders, one for each phase of the stride."""
    found = []
    for axis in range(2):
        reach = max(one.reach[axis] for one in traces)
        slack = max(one.slack[axis] for one in traces)
        least = reach + traces[0].jump[axis] + slack + (2 * reach + 2 if wraps else 0)
        found.append(range(least, least + traces[0].jump[axis]))
    return found


def _beside(sizes: list[range], reach: int) -> Iterator[_Size]:
    """Give smaller maps, on which the borders overlap, and last a larger one."""
    rows, columns = sizes
    for n in range(1, reach + 2):
        yield from {(min(n, rows.start), columns.start), (rows.start, min(n, columns.start))}
        yield min(n, rows.start), min(n, columns.start)
    yield rows.stop, columns.stop + 1


def _all_channels(pair: _Pair, size: _Size, groups: int) -> None:
    """Compare what both make of an impulse at every pixel of every channel, in a map that both have to take."""
    zero = pair.zeros(1, size)
    if (offset := pair.both(zero)) is None:
        raise NotLinearError(f"a map of {size[0]}x{size[1]} is too small for it")
    if pair.filters is None:
        none = offset[0].new_zeros(offset[0].shape[1])
        pair.filters = _Filters(none, none)
    pair.filters.see(offset[0] - offset[1], offset[1].clone())
    pixels, within = size[0] * size[1], pair.channels // groups
    numbers = pixels * max(zero.numel(), offset[0].numel())  # for one channel of each group
    if numbers * within > _MOST:
        raise NotLinearError("its operator has too many numbers")
    step = max(1, _AT_ONCE // numbers)
    for start in range(0, within, step):
        x = impulses(pair, size, range(start, min(start + step, within)), within)
        made = pair.both(x, pixels if groups == 1 else 0)
        if made is None:
            raise NotLinearError(f"it does not take several maps of {size[0]}x{size[1]}")
        one, other = (result - without for result, without in zip(made, offset, strict=True))
        pair.filters.see(one.sub_(other), other)


def impulses(pair: _Pair, size: _Size, channels: range, within: int) -> Tensor:
    """Give an image for every one of these channels of a group and every pixel, the pixels of a channel in a row."""
    pixels = size[0] * size[1]
    x = pair.zeros(len(channels) * pixels, size).view(len(channels), pixels, -1, within, pixels)
    place = torch.arange(pixels, device=pair.device)
    for i, channel in enumerate(channels):
        x[i, place, :, channel, place] = 1
    return x.view(-1, pair.channels, *size)


def _channels_at_once(pair: _Pair, size: _Size, groups: int, *, is_larger: bool) -> None:
    """Compare what both make of impulses at every pixel, each of different numbers in all channels."""
    pixels, within = size[0] * size[1], pair.channels // groups
    weights = 1 + torch.arange(pair.channels, dtype=torch.float64, device=pair.device) / pair.channels
    place = torch.arange(pixels, device=pair.device)
    step = max(1, _AT_ONCE // (pixels * pair.channels))
    assert pair.filters is not None
    for chosen in torch.split(place, step):
        x = pair.zeros(len(chosen), size).flatten(2)
        x[torch.arange(len(chosen), device=pair.device), :, chosen] = weights
        if (made := pair.both(x.view(-1, pair.channels, *size))) is not None:
            pair.filters.see((made[0] - made[1]) / (2 * within), None)
        elif is_larger:
            raise NotLinearError(f"it does not take maps of every size: {size[0]}x{size[1]} is too large")


def _mirrors(module: nn.Module) -> bool:
    """Whether a module pads with numbers of the map."""
    own: list[Any] = [vars(module).get("padding_mode"), getattr(vars(module).get("spec"), "padding_mode", None)]
    is_pad = isinstance(module, nn.CircularPad2d | nn.ReflectionPad2d | nn.ReplicationPad2d)
    return is_pad or any(mode not in (None, "zeros") for mode in own)
