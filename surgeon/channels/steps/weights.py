"""Convs and linear steps: one axis of the kernel is for the channels that are read, another for those given."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from surgeon.analysis import convs
from surgeon.analysis.obstacles import computes_its_tensors
from surgeon.channels.orders import cut, fix, repeated, unite
from surgeon.channels.values import Held, Known, Table, Value, Values
from surgeon.conv.spec import ConvSpec
from surgeon.octave.layout import Step


def _conv(steps: Values, step: Step) -> Known:
    """y_o = Σ_i w_oi ∗ x_i within each group; a depthwise conv has the order of what it reads."""
    conv = step.module
    assert isinstance(conv, nn.Conv2d)
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or computes_its_tensors(conv) or not isinstance(convs.read(conv), ConvSpec):
        return None
    before = steps.axis_at(step.operand, 3, conv.in_channels)
    shape = steps.shape(step.node)
    if before is None or shape is None or len(shape) < 3:
        return steps.fixed(conv, step)
    after, groups, per = steps.orders.of(weight, 0), conv.groups, conv.in_channels // conv.groups
    if groups == 1:
        unite(steps.orders.of(weight, 1), before)
    elif per == 1:
        unite(after, repeated(before, conv.out_channels // groups))
    else:
        filters = conv.out_channels // groups
        for i in range(groups):
            part = cut(before, i * per, (i + 1) * per)
            cut(after, i * filters, (i + 1) * filters)
            own = steps.orders.of(weight, 1, (i * filters, (i + 1) * filters))
            unite(own, part) if part is not None else fix(own, "a group of its conv cuts a channel")
    if bias is not None:
        unite(steps.orders.of(bias, 0), after)
    return Value(after, len(shape) - 3)


def _transposed(steps: Values, step: Step) -> Known:
    """As a conv, with the first two axes of its kernel the other way round."""
    conv, shape = step.module, steps.shape(step.node)
    assert isinstance(conv, nn.ConvTranspose2d)
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    before = steps.axis_at(step.operand, 3, conv.in_channels)
    if weight is None or conv.groups != 1 or before is None or shape is None or conv._forward_pre_hooks:
        return steps.fixed(conv, step)
    unite(steps.orders.of(weight, 0), before)
    if bias is not None:
        unite(steps.orders.of(bias, 0), steps.orders.of(weight, 1))
    return Value(steps.orders.of(weight, 1), len(shape) - 3)


def _linear(steps: Values, step: Step) -> Known:
    """y_o = Σ_i w_oi · x_i on the last axis."""
    linear, shape = step.module, steps.shape(step.node)
    assert isinstance(linear, nn.Linear)
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    before = steps.axis_at(step.operand, 1, linear.in_features)
    if weight is None or before is None or shape is None or linear._forward_pre_hooks:
        return steps.fixed(linear, step)
    unite(steps.orders.of(weight, 1), before)
    if bias is not None:
        unite(steps.orders.of(bias, 0), steps.orders.of(weight, 0))
    return Value(steps.orders.of(weight, 0), len(shape) - 1)


def _functional_linear(steps: Values, step: Step) -> Known:
    """As the module, with tensors that the network holds."""
    weight = steps.values.get(step.argument(1, "weight"))
    bias, shape = step.argument(2, "bias"), steps.shape(step.node)
    held = steps.values.get(bias) if bias is not None else None
    if not isinstance(weight, Held) or shape is None or (bias is not None and not isinstance(held, Held)):
        return None
    before = steps.axis_at(step.operand, 1, weight.tensor.shape[1])
    if before is None:
        return None
    unite(steps.orders.of(weight.tensor, 1), before)
    if isinstance(held, Held):
        unite(steps.orders.of(held.tensor, 0), steps.orders.of(weight.tensor, 0))
    return Value(steps.orders.of(weight.tensor, 0), len(shape) - 1)


TABLE = Table(
    modules={nn.ConvTranspose2d: _transposed, nn.Linear: _linear},
    functions={F.linear: _functional_linear},
    others=((lambda step: isinstance(step.module, nn.Conv2d), _conv),),
)
