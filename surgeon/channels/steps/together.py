"""Values that are combined number by number, put side by side or stacked."""

from __future__ import annotations

import torch
from torch import fx

from surgeon.channels.orders import flat, length, unite
from surgeon.channels.values import Held, Known, Table, Value, Values
from surgeon.octave.layout import Step
from surgeon.octave.rules import concat, elementwise, product
from surgeon.octave.rules import sum as sums


def _same(steps: Values, step: Step) -> Known:
    """A step on every number alone; bounds may be tensors of their own."""
    return _broadcast(steps, step) if step.others else steps.as_value(step.operand)


def _broadcast(steps: Values, step: Step) -> Known:
    """Numbers that are combined one by one: what lies on the axis of the channels has their order."""
    made, found = steps.shape(step.node), list[Value]()
    nodes = step.node.all_input_nodes
    if made is None:
        return None
    for node in nodes:
        value, shape = steps.values.get(node), steps.shape(node)
        if isinstance(value, Value) and shape is not None and length(value.axis) > 1:
            found.append(Value(value.axis, value.dim + len(made) - len(shape)))
    dims = {value.dim for value in found}
    if len(dims) > 1:
        return None
    if not found:
        held = [steps.as_value(node) for node in nodes if isinstance(steps.values.get(node), Held)]
        return held[0] if len(nodes) == len(held) == 1 else None
    first, back = found[0], len(made) - found[0].dim
    for node in nodes:
        shape = steps.shape(node)
        if shape is not None and (len(shape) < back or shape[-back] == 1):
            continue
        axis = steps.axis_at(node, back, made[first.dim])
        if axis is None:
            return None
        unite(first.axis, axis)
    return first


def _concat(steps: Values, step: Step) -> Known:
    """Channels side by side; along another axis, all parts have the same ones."""
    parts, made, along = step.argument(0, "tensors"), steps.shape(step.node), step.argument(1, "dim", 0)
    if made is None or not isinstance(along, int):
        return None
    if isinstance(split := steps.values.get(parts) if isinstance(parts, fx.Node) else None, tuple):
        whole = Value([one for part in split for one in flat(part.axis)], split[0].dim)
        return whole if along % len(made) == whole.dim else None
    if not isinstance(parts, list | tuple):
        return None
    dims = {value.dim for part in parts if (value := steps.as_value(part)) is not None}
    shapes = [steps.shape(part) for part in parts]
    if len(dims) != 1 or not all(shape is not None and len(shape) == len(made) for shape in shapes):
        return None
    [dim] = dims
    sized = zip(parts, shapes, strict=True)
    axes = [steps.axis_at(part, len(made) - dim, shape[dim]) for part, shape in sized if shape is not None]
    found = [axis for axis in axes if axis is not None]
    if len(found) != len(parts):
        return None
    if dim == along % len(made):
        return Value([one for axis in found for one in flat(axis)], dim)
    for axis in found[1:]:
        unite(found[0], axis)
    return Value(found[0], dim)


def _stack(steps: Values, step: Step) -> Known:
    """Maps of the same channels along a new axis."""
    parts, made, along = step.argument(0, "tensors"), steps.shape(step.node), step.argument(1, "dim", 0)
    if not isinstance(parts, list | tuple) or made is None or not isinstance(along, int):
        return None
    values = [value for part in parts if (value := steps.as_value(part)) is not None]
    if len(values) != len(parts) or len({value.dim for value in values}) != 1:
        return None
    for value in values[1:]:
        unite(values[0].axis, value.axis)
    return Value(values[0].axis, values[0].dim + (along % len(made) <= values[0].dim))


TABLE = Table(
    modules=dict.fromkeys(elementwise.MODULES, _same),
    functions={
        **dict.fromkeys(elementwise.FUNCTIONS, _same),
        **dict.fromkeys({*product.FUNCTIONS, *sums.FUNCTIONS}, _broadcast),
        **dict.fromkeys(concat.FUNCTIONS, _concat),
        torch.stack: _stack,
    },
    methods={
        **dict.fromkeys(elementwise.METHODS, _same),
        **dict.fromkeys({*product.METHODS, *sums.METHODS}, _broadcast),
    },
)
