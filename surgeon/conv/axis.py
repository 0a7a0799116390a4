"""Where the taps of a convolution lie on one axis, and where those of a sum or a sequence of convolutions lie.

    tap t of pixel p sees x[s·p + d·t − before]

How many pixels come out depends on `extra` = before + after − d·(k − 1) alone: ⌊(size + extra − 1) / s⌋ + 1. Of a sum
it is the same for all parts, and in a sequence extra₁ + s₁·extra₂, since nested floors are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class NotOneConvError(ValueError):
    """What was put together is not one convolution, and its text says why."""


class Axis(NamedTuple):
    """Where the taps lie on one axis."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0  # how far the first tap of the first pixel lies outside the map; a negative number crops
    after: int = 0

    @property
    def extra(self) -> int:
        return self.before + self.after - self.dilation * (self.kernel - 1)

    @property
    def is_point(self) -> bool:
        """Whether it has one tap, and makes of every stride-th pixel one."""
        return self.kernel == 1 and self.before == self.after == 0

    def then(self, other: Axis) -> Axis:
        """Give the axis of this one followed by another one."""
        step = _grid(self.dilation * (self.kernel > 1), self.stride * other.dilation * (other.kernel > 1))
        reach = self.dilation * (self.kernel - 1) + self.stride * other.dilation * (other.kernel - 1)
        before, extra = self.before + self.stride * other.before, self.extra + self.stride * other.extra
        return Axis(reach // step + 1, self.stride * other.stride, step, before, extra - before + reach)

    def places(self, other: Axis) -> tuple[list[int], list[int]]:
        """Where the taps of the first, and of the second of a sequence fall in that axis."""
        step = self.then(other).dilation
        first = [self.dilation * t // step for t in range(self.kernel)]
        return first, [self.stride * other.dilation * t // step for t in range(other.kernel)]

    @classmethod
    def around(cls, parts: Sequence[Axis]) -> Axis:
        """Give the axis that has the taps of all parts.

        Raises:
            NotOneConvError: they have other strides, or sizes that never fit each other.
        """
        strides, extras = {one.stride for one in parts}, [one.extra for one in parts]
        if len(strides) > 1:
            raise NotOneConvError(f"branches have the strides {' and '.join(map(str, sorted(strides)))}")
        stride = strides.pop()
        if max(extras) - min(extras) >= stride:
            raise NotOneConvError("branches give maps of different sizes")
        before = max(one.before for one in parts)
        step = _grid(*(one.dilation * (one.kernel > 1) for one in parts), *(before - one.before for one in parts))
        reach = max(before - one.before + one.dilation * (one.kernel - 1) for one in parts)
        return cls(reach // step + 1, stride, step, before, max(extras) - before + reach)

    def places_of(self, part: Axis) -> list[int]:
        """Where the taps of a part fall."""
        return [(self.before - part.before + part.dilation * t) // self.dilation for t in range(part.kernel)]

    def uncropped(self) -> Axis:
        """Give the same with taps of zero in front or behind instead of rows that are cropped."""
        front, behind = (-(min(side, 0) // self.dilation) for side in (self.before, self.after))
        step = self.dilation
        return self._replace(
            kernel=self.kernel + front + behind, before=self.before + front * step, after=self.after + behind * step
        )


def _grid(*distances: int) -> int:
    """The coarsest grid on which all distances lie."""
    return math.gcd(*distances) or 1
