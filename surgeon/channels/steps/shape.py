"""The same numbers in another shape, or with their axes in another order."""

from __future__ import annotations

import math

import torch
from torch import nn

from surgeon.channels.orders import repeated, shortened
from surgeon.channels.values import Held, Known, Table, Value, Values
from surgeon.octave.layout import Step


def _reshape(steps: Values, step: Step) -> Known:
    """A new shape of the same numbers: what lies before the channels stays, and each keeps its numbers in a row."""
    value, shape, made = steps.as_value(step.operand), steps.shape(step.operand), steps.shape(step.node)
    if step.operand is None or value is None or shape is None or made is None:
        return None
    has_batch = not isinstance(steps.values.get(step.operand), Held)
    if has_batch and (value.dim == 0 or made[:1] != shape[:1]):
        return None
    before, size, behind = math.prod(shape[: value.dim]), shape[value.dim], math.prod(shape[value.dim + 1 :])
    for dim in range(int(has_batch), len(made)):
        if math.prod(made[:dim]) != before or (made[dim] == 1 and size > 1):
            continue
        if made[dim] % size == 0 and behind % (made[dim] // size) == 0:
            return Value(repeated(value.axis, made[dim] // size), dim)
        if size % made[dim] == 0 and (axis := shortened(value.axis, size // made[dim])) is not None:
            return Value(axis, dim)
    return None


def _expand(steps: Values, step: Step) -> Known:
    value, shape, made = steps.as_value(step.operand), steps.shape(step.operand), steps.shape(step.node)
    if value is None or shape is None or made is None:
        return None
    dim = value.dim + len(made) - len(shape)
    return Value(value.axis, dim) if made[dim] == shape[value.dim] else None


def _permute(steps: Values, step: Step) -> Known:
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    given = step.node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if value is None or shape is None or not all(isinstance(dim, int) for dim in dims) or len(dims) != len(shape):
        return None
    return Value(value.axis, [dim % len(shape) for dim in dims if isinstance(dim, int)].index(value.dim))


def _transpose(steps: Values, step: Step) -> Known:
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    pair = (step.argument(1, "dim0"), step.argument(2, "dim1"))
    if value is None or shape is None or not all(isinstance(dim, int) for dim in pair):
        return None
    one, other = (dim % len(shape) for dim in pair)
    return Value(value.axis, {one: other, other: one}.get(value.dim, value.dim))


_NAMES = ("reshape", "flatten", "squeeze", "unsqueeze", "unflatten")
TABLE = Table(
    modules={nn.Flatten: _reshape, nn.Unflatten: _reshape},
    functions={
        **{getattr(torch, name): _reshape for name in _NAMES},
        torch.permute: _permute,
        torch.transpose: _transpose,
    },
    methods={
        **dict.fromkeys((*_NAMES, "view", "view_as"), _reshape),
        **dict.fromkeys(("expand", "expand_as"), _expand),
        "permute": _permute,
        "transpose": _transpose,
    },
)
