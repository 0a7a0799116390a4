"""Parts of a value: splits, slices and other indices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from surgeon.channels.orders import cut
from surgeon.channels.values import Known, Table, Value, Values
from surgeon.octave.layout import Step
from surgeon.octave.rules import select


def _split(steps: Values, step: Step) -> Known:
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    dim = step.argument(2, "dim", 0)
    if value is None or shape is None or not isinstance(dim, int):
        return None
    limits = select.parts_of(step, shape[dim % len(shape)])
    if dim % len(shape) != value.dim:
        return (value,) * len(limits) or None
    parts = [cut(value.axis, *limit) for limit in limits]
    found = tuple(Value(part, value.dim) for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None


def _getitem(steps: Values, step: Step) -> Known:
    """x[index]: a part of a split, or slices of some axes."""
    source, index = step.operand, step.argument(1, "index")
    known = steps.values.get(source) if source is not None else None
    if isinstance(known, tuple):
        if isinstance(index, slice):
            return known[index] or None
        return known[index] if isinstance(index, int) and -len(known) <= index < len(known) else None
    value, shape = steps.as_value(source), steps.shape(source)
    if value is None or shape is None:
        return None
    found = _where(index if isinstance(index, tuple) else (index,), value.dim, len(shape))
    if found is None:
        return None
    taken, dim = found
    if taken == slice(None):
        return Value(value.axis, dim)
    limits = (taken.start, taken.stop)
    if taken.step not in (None, 1) or not all(limit is None or isinstance(limit, int) for limit in limits):
        return None
    start, stop, _ = taken.indices(shape[value.dim])
    part = cut(value.axis, start, stop) if start < stop else None
    return None if part is None else Value(part, dim)


def _where(index: Sequence[Any], dim: int, rank: int) -> tuple[slice, int] | None:
    """Say which slice of an axis an index takes, and which axis of the result that is; None where it takes one."""
    given = sum(one is not None and one is not Ellipsis for one in index)
    parts: list[Any] = []
    for one in index:
        parts += [slice(None)] * (rank - given) if one is Ellipsis else [one]
    parts += [slice(None)] * (rank - sum(one is not None for one in parts))
    before = after = 0
    for one in parts:
        if one is not None and not isinstance(one, slice | int):
            return None
        if one is not None and before == dim:
            return (one, after) if isinstance(one, slice) else None
        before += one is not None
        after += not isinstance(one, int)
    return None


TABLE = Table(
    functions={**dict.fromkeys(select.SPLITS, _split), operator.getitem: _getitem},
    methods=dict.fromkeys(select.SPLIT_METHODS, _split),
)
