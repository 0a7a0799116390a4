"""Steps on every number alone, or on the pixels of each channel by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from surgeon.channels.values import Known, Table, Value, Values
from surgeon.octave.layout import Step
from surgeon.octave.rules import enlarge, spatial

_CASTS = {"to", "float", "double", "half", "type_as", "bfloat16"}
_PADS = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d, nn.CircularPad2d)
_POOLS = {*spatial.MODULES, *enlarge.MODULES, nn.UpsamplingBilinear2d, *_PADS}
_POOLING = {*spatial.FUNCTIONS, *enlarge.FUNCTIONS, F.upsample} - {torch.mean}


def _over_pixels(steps: Values, step: Step) -> Known:
    """A step on the last two axes, for each channel by itself."""
    value, shape, made = steps.as_value(step.operand), steps.shape(step.operand), steps.shape(step.node)
    if value is None or shape is None or made is None or len(made) != len(shape) or value.dim >= len(shape) - 2:
        return None
    return value if made[value.dim] == shape[value.dim] else None


def _pad(steps: Values, step: Step) -> Known:
    amounts = step.argument(1, "pad")
    return _over_pixels(steps, step) if isinstance(amounts, list | tuple) and len(amounts) <= 4 else None


def _mean(steps: Values, step: Step) -> Known:
    """A mean or a sum over other axes than that of the channels."""
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    given = step.argument(1, "dim")
    over = [given] if isinstance(given, int) else given
    if value is None or shape is None or not isinstance(over, list | tuple) or not over:
        return None
    dims = sorted(dim % len(shape) for dim in over if isinstance(dim, int))
    if value.dim in dims or len(dims) != len(over):
        return None
    gone = 0 if step.argument(2, "keepdim", False) else sum(dim < value.dim for dim in dims)
    return Value(value.axis, value.dim - gone)


def _softmax(steps: Values, step: Step) -> Known:
    """A softmax along another axis than that of the channels."""
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    along = step.argument(1, "dim") if step.module is None else step.module.dim
    if value is None or shape is None or not isinstance(along, int):
        return None
    return value if along % len(shape) != value.dim else None


def _cast(steps: Values, step: Step) -> Known:
    """The same numbers in another dtype, or elsewhere."""
    return steps.as_value(step.operand)


TABLE = Table(
    modules={**dict.fromkeys(_POOLS, _over_pixels), nn.Softmax: _softmax},
    functions={
        **dict.fromkeys(_POOLING, _over_pixels),
        F.pad: _pad,
        torch.mean: _mean,
        torch.sum: _mean,
        F.softmax: _softmax,
        torch.softmax: _softmax,
    },
    methods={**dict.fromkeys(_CASTS, _cast), "mean": _mean, "sum": _mean, "softmax": _softmax},
)
