"""Norms, and other modules that treat every channel alone with numbers of its own."""

from __future__ import annotations

from torch import nn

from surgeon.channels.orders import cut, length, unite
from surgeon.channels.values import Known, Table, Values
from surgeon.octave.layout import Step
from surgeon.octave.rules import elementwise, rule_of
from surgeon.octave.rules.norm import Norm


def _channelwise(steps: Values, step: Step) -> Known:
    """A module that treats every channel alone: each of its tensors has one number for each channel, or one for all."""
    module = step.module
    assert module is not None
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.numel() != 1]
    if value is None or shape is None or steps.shape(step.node) is None:
        return steps.fixed(module, step)
    if any(tensor.dim() != 1 or len(tensor) != length(value.axis) for tensor in tensors):
        return steps.fixed(module, step)
    if tensors and value.dim != 1:
        return steps.fixed(module, step)
    for tensor in tensors:
        unite(steps.orders.of(tensor, 0), value.axis)
    return value


def _group_norm(steps: Values, step: Step) -> Known:
    """A norm over groups of channels: they may change places within a group."""
    norm, value = step.module, steps.as_value(step.operand)
    assert isinstance(norm, nn.GroupNorm)
    if value is not None and value.dim == 1:
        per = norm.num_channels // norm.num_groups
        for start in range(0, norm.num_channels, per):
            cut(value.axis, start, start + per)
    return _channelwise(steps, step)


def _layer_norm(steps: Values, step: Step) -> Known:
    """A norm over all channels, if they are the last axis and it is over no other."""
    norm, value, shape = step.module, steps.as_value(step.operand), steps.shape(step.operand)
    assert isinstance(norm, nn.LayerNorm)
    if value is None or shape is None or len(norm.normalized_shape) != 1 or value.dim != len(shape) - 1:
        return steps.fixed(norm, step)
    for tensor in norm.parameters():
        unite(steps.orders.of(tensor, 0), value.axis)
    return value


def _is_channelwise(step: Step) -> bool:
    return step.module is not None and (isinstance(rule_of(step), Norm) or elementwise.is_elementwise(step.module))


TABLE = Table(
    modules={
        nn.PReLU: _channelwise,
        nn.InstanceNorm2d: _channelwise,
        nn.GroupNorm: _group_norm,
        nn.LayerNorm: _layer_norm,
    },
    others=((_is_channelwise, _channelwise),),
)
