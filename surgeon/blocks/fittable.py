"""What a block tells least squares: what its filters see, and which taps they have.

A block that approximates a conv is linear in its taps. A `View` is one linear problem: some of the conv's filters, and
the paths by which they see the input. Fitting (`surgeon/fitting`) knows no block; it asks for views, solves each, puts
the solved taps together into a kernel of the conv's shape, and hands that back.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from torch import Tensor
from typing_extensions import TypeVar

from surgeon.blocks.base import Block, BlockOptions
from surgeon.conv import streams
from surgeon.conv.least_squares import Problem
from surgeon.conv.patches import patches, size_of
from surgeon.conv.spec import ConvSpec
from surgeon.conv.streams import Ranges

Opts = TypeVar("Opts", bound=BlockOptions, default=Any)


@dataclass(frozen=True, slots=True)
class Path:
    """What filters see of the input by one way: a map, and the conv that slides over it.

    `channels` are those of the conv's kernel (its second axis) that this way uses; with `is_up`, every pixel of the
    result is repeated, as a low map is enlarged on its way into the high one.
    """

    seen: Tensor  # (n, c, h, w)
    spec: ConvSpec
    channels: Ranges
    is_up: bool = False

    def features(self, images: slice, size: tuple[int, int]) -> Tensor:
        """Lay out what the filters see: (n, groups, features, pixels)."""
        seen = self.seen[images]
        found = patches(seen, self.spec)
        if not self.is_up:
            return found
        maps = found.view(len(seen), -1, *size_of(seen, self.spec))
        return streams.up(maps, size).flatten(2)[:, None]


@dataclass(frozen=True, slots=True)
class View:
    """One linear problem: the `filters` of the conv that it is about, and what they see; groups have one path each.

    With `is_low` the filters give a map at half the resolution, and should give the pooled output of the conv.
    """

    name: str
    filters: Ranges
    paths: tuple[Path, ...]
    is_low: bool = False

    @property
    def groups(self) -> int:
        return self.paths[0].spec.groups

    def wanted(self, output: Tensor) -> Tensor:
        """The part of the conv's output (n, c_out, h, w) that these filters should give."""
        part = streams.take(output, self.filters)
        return streams.pool(part) if self.is_low else part

    def taps_of(self, kernel: Tensor) -> Tensor:
        """Cut the taps of these filters out of a kernel (out, in/groups, kh, kw): (groups, filters, features)."""
        rows = streams.take(kernel, self.filters, 0)
        taps = streams.take(rows, self._channels).flatten(1)
        return taps.view(self.groups, -1, taps.shape[1])

    def put_(self, taps: Tensor, kernel: Tensor) -> None:
        """Write the taps of these filters into a kernel."""
        rows = taps.reshape(taps.shape[0] * taps.shape[1], -1, *kernel.shape[2:])
        columns = [i for start, stop in self._channels for i in range(start, stop)]
        done = 0
        for start, stop in self.filters:
            kernel[start:stop, columns] = rows[done : done + stop - start].to(kernel)
            done += stop - start

    def without_maps(self) -> View:
        """Keep what is the same at every call."""
        return replace(self, paths=tuple(replace(path, seen=path.seen[:0]) for path in self.paths))

    @property
    def _channels(self) -> Ranges:
        return tuple(limits for path in self.paths for limits in path.channels)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One choice of which taps the filters of a view have (`kept`, (filters, features)), and how a block takes it."""

    kept: Tensor
    take_: Callable[[], None]


class Fittable(Block[Opts], abc.ABC, Generic[Opts]):
    """A block whose taps can be fitted to what the conv gave."""

    @abc.abstractmethod
    def views(self, *args: Any) -> Sequence[View]:
        """Say what its filters see in one call, whose arguments these are; the same views at every call."""

    @abc.abstractmethod
    def take_kernel_(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over taps from a kernel as the conv has it (out, in/groups, kh, kw), and a bias if the block has one."""

    def arrangements(self, view: View, problem: Problem, kernel: Tensor, weight: Tensor) -> Iterable[Arrangement]:
        """Give the choices of taps to try, first that which it has; none where filters have all that they see.

        `kernel` is the conv's own in float64, and `weight` (filters,) what an error of each filter costs.
        """
        return ()
