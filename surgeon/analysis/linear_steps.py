"""Which steps of a graph are linear and the same at every pixel, and what each of them is as an affine convolution.

A convolution, a batch norm in eval mode, a sum, a scale of channels, padding with zeros, average pooling, channels that
are taken or put side by side. Everything that is computed from parameters alone is a constant, and known as a tensor.

A step works on maps (n, c, h, w) or on vectors (…, c), where a linear layer is a 1×1 conv. LeViT turns vectors into one
long list for a batch norm and back, with flatten(0, 1) and reshape_as.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgeon.analysis import convs, own_norms
from surgeon.analysis.constants import Constants, by_channel, space_of
from surgeon.analysis.obstacles import computes_its_tensors, custom_call
from surgeon.blocks import norms
from surgeon.conv import affine
from surgeon.conv.affine import Affine
from surgeon.conv.axis import Axis, NotOneConvError
from surgeon.conv.kernels import Norm
from surgeon.conv.spec import ConvSpec, Pads

Apply = Callable[..., Affine]
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PADS = {
    nn.ZeroPad2d: "zeros",
    nn.ConstantPad2d: "zeros",
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.CircularPad2d: "circular",
}
_SAME = ("contiguous", "clone", "detach")
_WAYS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative, "neg", "neg_"), "neg"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
    **dict.fromkeys((torch.chunk, torch.split, "chunk", "split", torch.Tensor.chunk), "parts"),
    **dict.fromkeys((F.conv2d, torch.conv2d), "conv"),
    F.avg_pool2d: "mean",
    F.pad: "pad",
    operator.getitem: "take",
}


@dataclass(frozen=True, slots=True)
class Step:
    """A linear step: the steps that it reads, what it makes of them, and how many channels the first of them has.

    `kind` says what it is: 'conv', 'norm', 'sum', 'scale', 'mean', 'pad', 'take', 'cat', 'same', 'list' or 'unlist'. A
    `norm` with an activation behind it `leaves` the rest: what it makes is the norm alone.
    """

    kind: str
    operands: tuple[fx.Node, ...]
    apply: Apply
    channels: int | None = None
    leaves: bool = False
    space: str = ""  # 'map' or 'vector'; empty where it is the same for both


class Steps:
    """The steps of one graph, each looked at once."""

    def __init__(self, root: nn.Module, graph: fx.Graph, is_flat: Callable[[nn.Module], bool]) -> None:
        self.root = root
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._steps: dict[fx.Node, Step | None] = {}
        self.constants = Constants(root)
        self.is_flat = is_flat  # whether a norm is given vectors (n, c) alone: of (n, l, c) it norms the second axis

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a step calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def step(self, node: fx.Node) -> Step | None:
        """Say what a step is, or None where it is not linear."""
        if node not in self._steps:
            self._steps[node] = self._of(node)
        return self._steps[node]

    def _of(self, node: fx.Node) -> Step | None:
        if node.op == "call_module":
            return self._of_module(node)
        if node.op == "call_method" and node.target in _SAME:
            return _unary("same", node, lambda x: x)
        if (node.op, node.target, node.args[1:]) == ("call_method", "flatten", (0, 1)) and not node.kwargs:
            return _unary("list", node, lambda x: x)
        if (node.op, node.target) == ("call_method", "reshape_as") and isinstance(node.args[1], fx.Node):
            return _unary("unlist", node, lambda x: x)
        way = _WAYS.get(node.target) if node.op in ("call_function", "call_method") else None
        if way is None or self.constants.of(node) is not None:
            return None
        made: Step | None = getattr(self, f"_{way}")(node)
        return made

    def _of_module(self, node: fx.Node) -> Step | None:
        module = self.module(node)
        if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        if custom_call(module, "it") or any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            return None
        if type(module) is nn.Identity or (type(module) in _DROPOUTS and module.p == 0):
            return _unary("same", node, lambda x: x)
        if isinstance(module, nn.Conv2d):
            return _conv(node, module)
        if type(module) is nn.Linear:
            return _linear(node, module)
        if norms.is_batch_norm(module):
            is_known = not isinstance(module, nn.BatchNorm1d) or self.is_flat(module)
            return _norm(node, module) if is_known else None
        if type(module) is nn.AvgPool2d:
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            return _averaged(node, *(getattr(module, name) for name in names))
        if (mode := _PADS.get(type(module))) and not getattr(module, "value", 0):
            return _padded(node, module.padding, mode)
        return None

    def _add(self, node: fx.Node, sign: float = 1.0) -> Step | None:
        one, other, factor = _argument(node, 0), _argument(node, 1, "other"), sign * _number(node, "alpha")
        if set(node.kwargs) - {"alpha", "other", "input"}:
            return None
        fixed = [self.constants.of(one), self.constants.of(other)]
        if fixed[0] is None and fixed[1] is None:
            if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
                return None
            return Step("sum", (one, other), lambda x, y: x + (y if factor == 1 else y.scaled(factor)))
        moving, number, by = (one, fixed[1], factor) if fixed[0] is None else (other, fixed[0], 1.0)
        shift = by_channel(number)
        if not isinstance(moving, fx.Node) or shift is None:
            return None
        turned = factor if fixed[0] is not None else 1.0
        if not isinstance(shift, Tensor) and shift == 0 and turned == 1:  # sum() begins with a zero
            return Step("same", (moving,), lambda x: x)
        return Step("scale", (moving,), lambda x: _scaled(x, turned, shift, by), _count(shift), space=space_of(number))

    def _sub(self, node: fx.Node) -> Step | None:
        return self._add(node, -1.0)

    def _mul(self, node: fx.Node) -> Step | None:
        one, other = _argument(node, 0), _argument(node, 1, "other")
        fixed = [self.constants.of(one), self.constants.of(other)]
        if (fixed[0] is None) == (fixed[1] is None) or set(node.kwargs) - {"other", "input"}:
            return None
        moving, number = (one, fixed[1]) if fixed[0] is None else (other, fixed[0])
        factor = by_channel(number)
        if not isinstance(moving, fx.Node) or factor is None:
            return None
        return Step("scale", (moving,), lambda x: _scaled(x, factor, None, 1.0), _count(factor), space=space_of(number))

    def _div(self, node: fx.Node) -> Step | None:
        one, number = _argument(node, 0), self.constants.of(_argument(node, 1, "other"))
        factor = by_channel(number)
        if not isinstance(one, fx.Node) or factor is None or set(node.kwargs) - {"other", "input"}:
            return None
        return Step(
            "scale", (one,), lambda x: _scaled(x, 1 / factor, None, 1.0), _count(factor), space=space_of(number)
        )

    def _neg(self, node: fx.Node) -> Step | None:
        return _unary("scale", node, lambda x: x.scaled(-1.0))

    def _cat(self, node: fx.Node) -> Step | None:
        parts = _argument(node, 0, "tensors")
        if not isinstance(parts, list | tuple) or _argument(node, 1, "dim", 0) not in (1, -3):
            return None
        if not all(isinstance(one, fx.Node) and self.constants.of(one) is None for one in parts):
            return None
        return Step("cat", tuple(parts), lambda *found: affine.side_by_side(found), space="map")

    def _parts(self, node: fx.Node) -> Step | None:
        """A cut into parts is what it cuts; each part is taken by its own step."""
        if _argument(node, 2, "dim", 0) not in (1, -3) or not isinstance(_argument(node, 1), int | list | tuple):
            return None
        if not all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users):
            return None
        return _unary("take", node, lambda x: x, space="map")

    def _take(self, node: fx.Node) -> Step | None:
        source, index = node.args
        if not isinstance(source, fx.Node):
            return None
        if isinstance(index, int) and _WAYS.get(source.target) == "parts":
            is_chunk = source.target in (torch.chunk, "chunk")
            sizes = _argument(source, 1)
            return Step("take", (source,), lambda x: _part(x, sizes, index, is_chunk=is_chunk), space="map")
        if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None) or not isinstance(index[1], slice):
            return None
        ends = (index[1].start, index[1].stop, index[1].step)
        if not all(one is None or isinstance(one, int) for one in ends) or not all(map(_is_whole, index[2:])):
            return None
        cut: slice[Any, Any, Any] = index[1]
        return Step("take", (source,), lambda x: x.then(Affine.take(x.c_out, range(x.c_out)[cut])), space="map")

    def _conv(self, node: fx.Node) -> Step | None:
        """A call of F.conv2d whose kernel is computed from parameters."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {name: _argument(node, i, name, None) for i, name in enumerate(names)}
        weight, bias = self.constants.of(given["weight"]), self.constants.of(given["bias"])
        if not isinstance(given["input"], fx.Node) or not isinstance(weight, Tensor) or weight.dim() != 4:
            return None
        if given["bias"] is not None and not isinstance(bias, Tensor):
            return None
        padding = given["padding"] or 0
        stride, dilation = (_pair(given[name] or 1) for name in ("stride", "dilation"))
        if stride is None or dilation is None or not (isinstance(padding, str) or _pair(padding)):
            return None
        groups = given["groups"] or 1
        spec = ConvSpec(
            weight.shape[1] * groups,
            len(weight),
            (weight.shape[2], weight.shape[3]),
            stride=stride,
            padding=padding if isinstance(padding, str) else _pair(padding) or (0, 0),
            dilation=dilation,
            groups=groups,
        )
        return Step("conv", (given["input"],), lambda x: x.then(Affine.of(weight, bias, spec)), spec.c_in, space="map")

    def _mean(self, node: fx.Node) -> Step | None:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        usual = (None, None, 0, False, True, None)
        given = [_argument(node, i + 1, name, usual[i]) for i, name in enumerate(names)]
        return _averaged(node, *given)

    def _pad(self, node: fx.Node) -> Step | None:
        mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", None)
        if value:
            return None
        return _padded(node, _argument(node, 1, "pad"), "zeros" if mode == "constant" else mode)


def _conv(node: fx.Node, conv: nn.Conv2d) -> Step | None:
    if computes_its_tensors(conv) or conv.weight.is_complex() or not conv.weight.numel():
        return None
    spec = convs.read(conv)
    if isinstance(spec, str):
        return None
    return _unary("conv", node, lambda x: x.then(Affine.of(conv.weight, conv.bias, spec)), spec.c_in, space="map")


def _linear(node: fx.Node, layer: nn.Linear) -> Step | None:
    if computes_its_tensors(layer) or not layer.weight.is_floating_point() or not layer.weight.numel():
        return None
    spec = ConvSpec(layer.in_features, layer.out_features, (1, 1))
    weight, bias = layer.weight[:, :, None, None], layer.bias
    return _unary("conv", node, lambda x: x.then(Affine.of(weight, bias, spec)), spec.c_in, space="vector")


def _norm(node: fx.Node, norm: nn.Module) -> Step | None:
    if norm.running_mean is None or norm.running_var is None or isinstance(norm, nn.BatchNorm3d):
        return None
    if computes_its_tensors(norm):
        return None
    space = "vector" if isinstance(norm, nn.BatchNorm1d) else "map"
    if own_norms.refusal(norm, has_bias=False) is not None:
        return None
    numbers = Norm.of(norms.core_of(norm))
    behind = [norm.get_submodule(name) for name in norms.rest_of(norm)]
    leaves = any(type(one) is not nn.Identity or custom_call(one, "it") for one in behind)
    return _unary("norm", node, lambda x: x.then(Affine.norm(numbers)), len(numbers.var), leaves=leaves, space=space)


def _unary(
    kind: str, node: fx.Node, apply: Apply, channels: int | None = None, *, leaves: bool = False, space: str = ""
) -> Step | None:
    first = node.args[0] if node.args else None
    return Step(kind, (first,), apply, channels, leaves, space) if isinstance(first, fx.Node) else None


def _averaged(
    node: fx.Node, kernel: Any, stride: Any, padding: Any, ceil: Any, counts_pads: Any, divisor: Any
) -> Step | None:
    size, pads = _pair(kernel), _pair(padding)
    step = _pair(stride) if stride not in (None, [], ()) else size
    if size is None or pads is None or step is None or ceil or (any(pads) and not counts_pads):
        return None
    rows, columns = (Axis(k, s, 1, p, p) for k, s, p in zip(size, step, pads, strict=True))
    return _unary("mean", node, lambda x: x.then(Affine.mean(x.c_out, rows, columns, divisor=divisor)), space="map")


def _padded(node: fx.Node, sides: Any, mode: Any) -> Step | None:
    sides = (sides,) * 4 if isinstance(sides, int) else sides
    if not isinstance(sides, list | tuple) or not all(type(one) is int for one in sides) or len(sides) not in (2, 4):
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    pads = Pads(top, bottom, left, right)
    return _unary("pad", node, lambda x: x.then(Affine.pad(x.c_out, pads, mode)), space="map")


def _part(x: Affine, sizes: Any, index: int, *, is_chunk: bool) -> Affine:
    if is_chunk or isinstance(sizes, int):
        size = -(-x.c_out // sizes) if is_chunk else sizes
        parts = [range(x.c_out)[i : i + size] for i in range(0, x.c_out, size)]
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    if not -len(parts) <= index < len(parts):
        raise NotOneConvError("a part is taken that is not there")
    return x.then(Affine.take(x.c_out, parts[index]))


def _scaled(x: Affine, factor: Tensor | float, shift: Tensor | float | None, by: float) -> Affine:
    """x·factor + by·shift, with numbers for all channels or for each."""
    ones = torch.ones(x.c_out, dtype=torch.float64, device=x.kernel.device)
    factor = factor.to(ones.device) if isinstance(factor, Tensor) else factor
    shift = shift.to(ones.device) if isinstance(shift, Tensor) else shift
    for given in (factor, shift):
        if isinstance(given, Tensor) and len(given) != x.c_out:
            raise NotOneConvError("a scale has another number of channels")
    return x.then(Affine.scale(ones * factor, None if shift is None else ones * shift * by))


def _count(value: Tensor | float) -> int | None:
    return len(value) if isinstance(value, Tensor) else None


def _argument(node: fx.Node, index: int, name: str = "", usual: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, usual)


def _number(node: fx.Node, name: str) -> float:
    value = node.kwargs.get(name, 1)
    return float(value) if isinstance(value, int | float) else float("nan")


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return (value, value)
    if isinstance(value, Sequence) and len(value) in (1, 2) and all(type(one) is int for one in value):
        return (value[0], value[-1])
    return None


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or index == slice(None)


def channels_of(source: fx.Node, inside: Mapping[fx.Node, Step]) -> int | None:
    """Find how many channels a map has, by the first step that reads all of them and says so."""
    waiting, seen = [source], {source}
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            step = inside.get(user)
            if step is None or node not in step.operands or user in seen:
                continue
            if step.channels is not None and step.kind != "scale":  # a scale of 8 channels may make 8 of one
                return step.channels
            if step.channels is None and step.kind in ("same", "mean", "pad", "scale", "list", "unlist"):
                seen.add(user)
                waiting.append(user)
    return None
