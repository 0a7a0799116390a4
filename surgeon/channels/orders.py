"""Orders of channels: what may be permuted by itself, and what has to be permuted along with it.

An axis of a tensor or of a feature map is a row of segments. A segment is an order with, for each of its channels, so
many numbers in a row (one in a map; height · width behind a flatten). Whatever two axes share is one order:

    y = a + b           the axes of a, b and y are the same row of orders
    cat(a, b)           the segments of a, then those of b
    x[:, :k]            the order is cut in two at k, wherever it lies
    flatten(x)          each channel has height · width numbers in a row

An order may be permuted by any permutation, at all its places at once, unless it is fixed; then it says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Order:
    """So many channels whose order can be changed. One that was cut or united has `became` others."""

    __slots__ = ("became", "fixed", "size")

    def __init__(self, size: int, fixed: str | None = None) -> None:
        self.size, self.fixed = size, fixed
        self.became: list[Segment] | None = None


class Segment(NamedTuple):
    """An order on an axis, with `each` numbers in a row for each of its channels."""

    order: Order
    each: int = 1

    @property
    def length(self) -> int:
        return self.order.size * self.each


Axis = list[Segment]


class Key(NamedTuple):
    """An axis of a tensor; of some of its rows only (the first axis), where groups of a conv differ."""

    tensor: int  # its id
    axis: int
    rows: tuple[int, int] | None = None


@dataclass(slots=True)
class Orders:
    """The axes of all tensors that steps of a network read, as far as they are known."""

    axes: dict[Key, Axis] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)  # by their ids, which stay theirs as long as they live

    def of(self, tensor: Tensor, axis: int, rows: tuple[int, int] | None = None) -> Axis:
        """Give an axis of a tensor, which is a new order when it is first asked for."""
        self.tensors[id(tensor)] = tensor
        return self.axes.setdefault(Key(id(tensor), axis, rows), [Segment(Order(tensor.shape[axis]))])

    def fix_tensor(self, tensor: Tensor, why: str) -> None:
        """Fix every axis of a tensor."""
        for axis in range(tensor.dim()):
            fix(self.of(tensor, axis), why)
        for key, axis_known in self.axes.items():
            if key.tensor == id(tensor):
                fix(axis_known, why)


def flat(axis: Iterable[Segment]) -> Axis:
    """Give the row of orders that an axis is today."""
    found: Axis = []
    for order, each in axis:
        if order.became is None:
            found.append(Segment(order, each))
        else:
            order.became = flat(order.became)
            found += [Segment(one, each * more) for one, more in order.became]
    return found


def length(axis: Iterable[Segment]) -> int:
    return sum(one.length for one in flat(axis))


def fix(axis: Iterable[Segment], why: str) -> None:
    """Let the orders of an axis stay as they are; the first reason is kept."""
    for order, _ in flat(axis):
        order.fixed = order.fixed or why


def repeated(axis: Iterable[Segment], times: int) -> Axis:
    """Give every channel so many times the numbers in a row that it has."""
    return [Segment(order, each * times) for order, each in flat(axis)]


def shortened(axis: Iterable[Segment], times: int) -> Axis | None:
    """Undo `repeated`; None where the numbers of a channel cannot be divided so."""
    found = flat(axis)
    return None if any(each % times for _, each in found) else [Segment(one, each // times) for one, each in found]


def cut(axis: Sequence[Segment], start: int, stop: int) -> Axis | None:
    """Give a part of an axis; orders are cut at its ends. None, and the axis is fixed, where a channel would be cut."""
    for border in (start, stop):
        if not _cut_at(axis, border):
            fix(axis, "a step cuts through the numbers of one channel")
            return None
    found, at = [], 0
    for one in flat(axis):
        found += [one] if start <= at < stop else []
        at += one.length
    return found


def _cut_at(axis: Sequence[Segment], border: int) -> bool:
    at = 0
    for one in flat(axis):
        if at < border < at + one.length:
            if (border - at) % one.each:
                return False
            _split(one.order, (border - at) // one.each)
            return True
        at += one.length
    return True


def _split(order: Order, at: int) -> None:
    order.became = [Segment(Order(size, order.fixed)) for size in (at, order.size - at)]


def unite(a: Sequence[Segment], b: Sequence[Segment]) -> None:
    """Let two axes be the same row of orders; they are fixed where their numbers cannot be told channel by channel."""
    why = "two steps divide its channels differently"
    if length(a) != length(b):
        fix([*a, *b], why)
        return
    while (pair := _first_difference(a, b)) is not None:
        (one, each), (other, more) = sorted(pair, key=lambda segment: segment.each)
        shorter = min(one.size * each, other.size * more)
        if one is other or more % each or shorter % more:
            fix([*a, *b], why)
            return
        if one.size * each > shorter:
            _split(one, shorter // each)
        elif other.size * more > shorter:
            _split(other, shorter // more)
        else:
            other.fixed = other.fixed or one.fixed
            one.became = [Segment(other, more // each)]


def _first_difference(a: Sequence[Segment], b: Sequence[Segment]) -> tuple[Segment, Segment] | None:
    pairs = zip(flat(a), flat(b), strict=False)
    return next(((one, other) for one, other in pairs if one != other), None)


def starts(axis: Sequence[Segment]) -> list[tuple[Segment, int]]:
    """Give the segments of an axis, and where each begins.

    >>> [start for _, start in starts([Segment(Order(3), 2), Segment(Order(4))])]
    [0, 6]
    """
    found = flat(axis)
    return list(zip(found, itertools.accumulate((one.length for one in found), initial=0), strict=False))
