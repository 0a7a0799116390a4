"""What the steps of a graph do to channels: which of a step's axes are the axes of what it reads.

A step that is not known here fixes the orders of all that it reads: how it treats each channel may depend on where the
channel lies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgeon.analysis import convs
from surgeon.analysis.obstacles import computes_its_tensors
from surgeon.analysis.shapes import Shapes
from surgeon.channels.orders import Axis, Order, Orders, Segment, cut, fix, flat, length, repeated, shortened, unite
from surgeon.conv.spec import ConvSpec
from surgeon.octave.layout import Modules, Step
from surgeon.octave.rules import concat, elementwise, enlarge, product, rule_of, select, spatial
from surgeon.octave.rules import sum as sums
from surgeon.octave.rules.norm import Norm


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that a step gives: the axis of its channels, and which one of its axes that is."""

    axis: Axis
    dim: int


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or buffer that a step reads; which of its axes are channels is said by who reads it."""

    tensor: Tensor


Known = Value | Held | tuple[Value, ...] | None  # a tuple: the parts of a split. None: nothing that has an order

_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "get_device"}
_SHAPES = {"shape", "dtype", "device", "ndim", "is_cuda", "layout"}
_CASTS = {"to", "float", "double", "half", "type_as", "bfloat16"}
_RESHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "view_as", "unflatten"}
_RESHAPING = {torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten}
_PADS = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d, nn.CircularPad2d)
_POOLS = {*spatial.MODULES, *enlarge.MODULES, nn.UpsamplingBilinear2d, *_PADS}
_POOLING = {*spatial.FUNCTIONS, *enlarge.FUNCTIONS, F.upsample} - {None}
_BINARY = {*product.FUNCTIONS, *sums.FUNCTIONS}
_BINARY_METHODS = {*product.METHODS, *sums.METHODS}


class Steps:
    """Follows the channels through the steps of one island's graph, one by one."""

    def __init__(self, orders: Orders, modules: Modules, shapes: Shapes) -> None:
        self.orders, self.modules, self.shapes = orders, modules, shapes
        self.values: dict[fx.Node, Known] = {}

    def follow(self, node: fx.Node) -> None:
        """Say what a step gives; what it reads has been followed before."""
        step = Step(node, self.modules)
        if node.op == "get_attr":
            self.values[node] = self._attribute(str(node.target))
        elif node.op == "placeholder" or _asks_for_shape(step):
            self.values[node] = None
        else:
            handler = None if step.is_customised else _handler(step)
            if handler is None or (made := handler(self, step)) is None:
                made = self._unknown(step)
            self.values[node] = made

    def _attribute(self, target: str) -> Known:
        holder, _, name = target.rpartition(".")
        found = getattr(self.modules.get(holder), name, None)
        return Held(found) if isinstance(found, Tensor) else None

    def _unknown(self, step: Step) -> Known:
        for value in step.node.all_input_nodes:
            self.fix(self.values.get(value), f"{step.said} is a step that channels cannot be followed through")
        return None

    def fix(self, known: Known, why: str) -> None:
        if isinstance(known, Held):
            self.orders.fix_tensor(known.tensor, why)
        elif known is not None:
            for one in (known,) if isinstance(known, Value) else known:
                fix(one.axis, why)

    def shape(self, value: Any) -> tuple[int, ...] | None:
        return self.shapes.get(value.name) if isinstance(value, fx.Node) else None

    def axis_at(self, value: Any, back: int, size: int) -> Axis | None:
        """Give the axis that lies so far from the last one, which channels have to be; None where others are."""
        shape, known = self.shape(value), self.values.get(value) if isinstance(value, fx.Node) else None
        if shape is None or len(shape) < back or shape[-back] != size:
            return None
        if isinstance(known, Value):
            return known.axis if known.dim == len(shape) - back else None
        if isinstance(known, Held):
            return self.orders.of(known.tensor, known.tensor.dim() - back)
        return [Segment(Order(size, "it reads what the network is given, or what could not be followed"))]

    def as_value(self, value: Any) -> Value | None:
        """Give a value with one axis of channels; of a tensor that is held, the only axis that is longer than one."""
        known = self.values.get(value) if isinstance(value, fx.Node) else None
        if isinstance(known, Held):
            dims = [dim for dim, size in enumerate(known.tensor.shape) if size > 1]
            return Value(self.orders.of(known.tensor, dims[0]), dims[0]) if len(dims) == 1 else None
        return known if isinstance(known, Value) else None


Handler = Callable[[Steps, Step], Known]


def _handler(step: Step) -> Handler | None:
    """Find what a step does to channels."""
    if isinstance(step.module, nn.Conv2d):
        return _conv
    if step.module is not None:
        kind = type(step.module)
        if kind in _MODULES:
            return _MODULES[kind]
        return _channelwise if isinstance(rule_of(step), Norm) or elementwise.is_elementwise(step.module) else None
    if step.node.op == "call_method":
        return _METHODS.get(str(step.node.target))
    return _FUNCTIONS.get(step.node.target) if step.node.op == "call_function" else None


def _asks_for_shape(step: Step) -> bool:
    node = step.node
    if node.op == "call_method":
        return str(node.target) in _SHAPE_METHODS
    return node.target is getattr and str(node.args[1]) in _SHAPES


def _conv(steps: Steps, step: Step) -> Known:
    """y_o = Σ_i w_oi ∗ x_i within each group; a depthwise conv has the order of what it reads."""
    conv = step.module
    assert isinstance(conv, nn.Conv2d)
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or computes_its_tensors(conv) or not isinstance(convs.read(conv), ConvSpec):
        return None
    before = steps.axis_at(step.operand, 3, conv.in_channels)
    shape = steps.shape(step.node)
    if before is None or shape is None or len(shape) < 3:
        return _fixed(steps, conv, step)
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


def _transposed(steps: Steps, step: Step) -> Known:
    """As a conv, with the first two axes of its kernel the other way round."""
    conv, shape = step.module, steps.shape(step.node)
    assert isinstance(conv, nn.ConvTranspose2d)
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    before = steps.axis_at(step.operand, 3, conv.in_channels)
    if weight is None or conv.groups != 1 or before is None or shape is None or conv._forward_pre_hooks:
        return _fixed(steps, conv, step)
    unite(steps.orders.of(weight, 0), before)
    if bias is not None:
        unite(steps.orders.of(bias, 0), steps.orders.of(weight, 1))
    return Value(steps.orders.of(weight, 1), len(shape) - 3)


def _linear(steps: Steps, step: Step) -> Known:
    """y_o = Σ_i w_oi · x_i on the last axis."""
    linear, shape = step.module, steps.shape(step.node)
    assert isinstance(linear, nn.Linear)
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    before = steps.axis_at(step.operand, 1, linear.in_features)
    if weight is None or before is None or shape is None or linear._forward_pre_hooks:
        return _fixed(steps, linear, step)
    unite(steps.orders.of(weight, 1), before)
    if bias is not None:
        unite(steps.orders.of(bias, 0), steps.orders.of(weight, 0))
    return Value(steps.orders.of(weight, 0), len(shape) - 1)


def _functional_linear(steps: Steps, step: Step) -> Known:
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


def _fixed(steps: Steps, module: nn.Module, step: Step) -> Known:
    """Fix all tensors of a module that is called in a way that could not be followed; the caller fixes the rest."""
    for tensor in (*module.parameters(), *module.buffers()):
        steps.orders.fix_tensor(tensor, f"{step.said} is called on something that could not be followed")
    return None


def _channelwise(steps: Steps, step: Step) -> Known:
    """A module that treats every channel alone: each of its tensors has one number for each channel, or one for all."""
    module = step.module
    assert module is not None
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.numel() != 1]
    if value is None or shape is None or steps.shape(step.node) is None:
        return _fixed(steps, module, step)
    if any(tensor.dim() != 1 or len(tensor) != length(value.axis) for tensor in tensors):
        return _fixed(steps, module, step)
    if tensors and value.dim != 1:
        return _fixed(steps, module, step)
    for tensor in tensors:
        unite(steps.orders.of(tensor, 0), value.axis)
    return value


def _group_norm(steps: Steps, step: Step) -> Known:
    """A norm over groups of channels: they may change places within a group."""
    norm, value = step.module, steps.as_value(step.operand)
    assert isinstance(norm, nn.GroupNorm)
    if value is not None and value.dim == 1:
        per = norm.num_channels // norm.num_groups
        for start in range(0, norm.num_channels, per):
            cut(value.axis, start, start + per)
    return _channelwise(steps, step)


def _layer_norm(steps: Steps, step: Step) -> Known:
    """A norm over all channels, if they are the last axis and it is over no other."""
    norm, value, shape = step.module, steps.as_value(step.operand), steps.shape(step.operand)
    assert isinstance(norm, nn.LayerNorm)
    if value is None or shape is None or len(norm.normalized_shape) != 1 or value.dim != len(shape) - 1:
        return _fixed(steps, norm, step)
    for tensor in norm.parameters():
        unite(steps.orders.of(tensor, 0), value.axis)
    return value


def _same(steps: Steps, step: Step) -> Known:
    """A step on every number alone; bounds may be tensors of their own."""
    return _broadcast(steps, step) if step.others else steps.as_value(step.operand)


def _over_pixels(steps: Steps, step: Step) -> Known:
    """A step on the last two axes, for each channel by itself."""
    value, shape, made = steps.as_value(step.operand), steps.shape(step.operand), steps.shape(step.node)
    if value is None or shape is None or made is None or len(made) != len(shape) or value.dim >= len(shape) - 2:
        return None
    return value if made[value.dim] == shape[value.dim] else None


def _pad(steps: Steps, step: Step) -> Known:
    amounts = step.argument(1, "pad")
    return _over_pixels(steps, step) if isinstance(amounts, list | tuple) and len(amounts) <= 4 else None


def _mean(steps: Steps, step: Step) -> Known:
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


def _broadcast(steps: Steps, step: Step) -> Known:
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


def _concat(steps: Steps, step: Step) -> Known:
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


def _stack(steps: Steps, step: Step) -> Known:
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


def _softmax(steps: Steps, step: Step) -> Known:
    """A softmax along another axis than that of the channels."""
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    along = step.argument(1, "dim") if step.module is None else step.module.dim
    if value is None or shape is None or not isinstance(along, int):
        return None
    return value if along % len(shape) != value.dim else None


def _split(steps: Steps, step: Step) -> Known:
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


def _getitem(steps: Steps, step: Step) -> Known:
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


def _reshape(steps: Steps, step: Step) -> Known:
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


def _expand(steps: Steps, step: Step) -> Known:
    value, shape, made = steps.as_value(step.operand), steps.shape(step.operand), steps.shape(step.node)
    if value is None or shape is None or made is None:
        return None
    dim = value.dim + len(made) - len(shape)
    return Value(value.axis, dim) if made[dim] == shape[value.dim] else None


def _permute(steps: Steps, step: Step) -> Known:
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    given = step.node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if value is None or shape is None or not all(isinstance(dim, int) for dim in dims) or len(dims) != len(shape):
        return None
    return Value(value.axis, [dim % len(shape) for dim in dims if isinstance(dim, int)].index(value.dim))


def _transpose(steps: Steps, step: Step) -> Known:
    value, shape = steps.as_value(step.operand), steps.shape(step.operand)
    pair = (step.argument(1, "dim0"), step.argument(2, "dim1"))
    if value is None or shape is None or not all(isinstance(dim, int) for dim in pair):
        return None
    one, other = (dim % len(shape) for dim in pair)
    return Value(value.axis, {one: other, other: one}.get(value.dim, value.dim))


_MODULES: Mapping[type[nn.Module], Handler] = {
    **dict.fromkeys(elementwise.MODULES, _same),
    **dict.fromkeys(_POOLS, _over_pixels),
    nn.PReLU: _channelwise,
    nn.ConvTranspose2d: _transposed,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm2d: _channelwise,
    nn.LayerNorm: _layer_norm,
    nn.Softmax: _softmax,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
}
_FUNCTIONS: Mapping[Any, Handler] = {
    **dict.fromkeys(elementwise.FUNCTIONS, _same),
    **dict.fromkeys(_POOLING, _over_pixels),
    **dict.fromkeys(_BINARY, _broadcast),
    **dict.fromkeys(concat.FUNCTIONS, _concat),
    **dict.fromkeys(select.SPLITS, _split),
    **dict.fromkeys(_RESHAPING, _reshape),
    F.pad: _pad,
    torch.mean: _mean,
    torch.sum: _mean,
    torch.stack: _stack,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    F.linear: _functional_linear,
    torch.permute: _permute,
    torch.transpose: _transpose,
    operator.getitem: _getitem,
}
_METHODS: Mapping[str, Handler] = {
    **dict.fromkeys(elementwise.METHODS, _same),
    **dict.fromkeys(_CASTS, lambda steps, step: steps.as_value(step.operand)),
    **dict.fromkeys(_BINARY_METHODS, _broadcast),
    **dict.fromkeys(select.SPLIT_METHODS, _split),
    **dict.fromkeys(_RESHAPES, _reshape),
    "mean": _mean,
    "sum": _mean,
    "softmax": _softmax,
    "expand": _expand,
    "expand_as": _expand,
    "permute": _permute,
    "transpose": _transpose,
}
