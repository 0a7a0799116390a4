"""What steps of a graph do to the channels of a feature map, and so to its two streams. Tables, and one function.

A step that treats every channel alone, and every pixel alone, can be done to the two streams apart:
f(join(h, l)) = join(f(h), f(l)). Its name stands in a table here. What no table holds needs the whole map.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from surgeon.analysis.obstacles import custom_call
from surgeon.blocks.octave import OctaveConv
from surgeon.blocks.pairs import PairNorm
from surgeon.conv import streams
from surgeon.conv.streams import Ranges

_ELEMENTWISE_MODULES = {
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
}
_ELEMENTWISE_FUNCTIONS = {
    *(F.relu, F.relu6, F.relu_, F.leaky_relu, F.leaky_relu_, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid),
    *(F.threshold, F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.exp, torch.neg, torch.square),
    operator.neg,
}
_ELEMENTWISE_METHODS = {
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "abs", "exp", "neg", "square", "contiguous"),
    *("clone", "detach"),
}
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_PRODUCTS = {operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div}
_SUM_METHODS, _PRODUCT_METHODS = {"add", "add_", "sub", "sub_"}, {"mul", "mul_", "div", "div_"}
_CONCATENATIONS = {torch.cat, torch.concat}
_SPATIAL_MODULES = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d}
_SPATIAL_FUNCTIONS = {
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    F.lp_pool2d,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the channels of a value lie: how many, which are low, and at which resolution those are.

    `low` is empty for a plain map. `is_fine`: its low channels have been pooled to the resolution of the high ones by a
    step of the network, and lie beside them. `is_point`: it is one pixel, so it goes with maps of any size.
    """

    channels: int | None = None
    low: Ranges = ()
    is_fine: bool = False
    is_point: bool = False

    @property
    def is_octave(self) -> bool:
        return bool(self.low) and not self.is_fine

    @property
    def plain(self) -> Layout:
        return replace(self, low=(), is_fine=False)


@dataclass(frozen=True, slots=True)
class Flow:
    """What comes out of a step: the layout; why streams that went in had to be joined; operands to be low-passed."""

    layout: Layout
    seam: str | None = None
    low_pass: tuple[fx.Node, ...] = ()


Layouts = Mapping[fx.Node, Layout]
Modules = Mapping[str, nn.Module]


def role(node: fx.Node, modules: Modules) -> str:
    """Name what a step is to two streams: conv, octave, norm, elementwise, sum, product, concat, spatial, … or other.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten())).graph
    >>> [role(node, {"0": nn.ReLU(), "1": nn.Flatten()}) for node in graph.nodes]
    ['input', 'elementwise', 'other', 'other']
    """
    if node.op == "call_module":
        return _role_of_module(modules[str(node.target)])
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "call_function":
        if node.target is streams.low_pass:
            return "low_pass"
        if node.target in (torch.mean,):
            return "spatial" if _is_spatial_mean(node) else "other"
        return _in_tables(node.target, _ELEMENTWISE_FUNCTIONS, _SUMS, _PRODUCTS, _CONCATENATIONS, _SPATIAL_FUNCTIONS)
    if node.op == "call_method":
        if node.target == "mean":
            return "spatial" if _is_spatial_mean(node) else "other"
        return _in_tables(node.target, _ELEMENTWISE_METHODS, _SUM_METHODS, _PRODUCT_METHODS, set(), set())
    return "other"


def _in_tables(target: Any, *tables: set[Any]) -> str:
    names = ("elementwise", "sum", "product", "concat", "spatial")
    return next((name for name, table in zip(names, tables, strict=True) if target in table), "other")


def _role_of_module(module: nn.Module) -> str:
    kind = type(module)
    if custom_call(module, "it"):  # a hook would see streams where it saw a map
        return "other"
    if isinstance(module, OctaveConv):
        return "conv" if module.keeps_seams else "octave"
    if isinstance(module, nn.Conv2d):
        return "conv"
    if kind in (nn.BatchNorm2d, PairNorm):
        return "norm"
    if kind in _SPATIAL_MODULES:
        return "spatial"
    is_alike = kind is nn.PReLU and module.num_parameters == 1
    return "elementwise" if kind in _ELEMENTWISE_MODULES or is_alike else "other"


def flow(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    """Say how the channels lie behind a step, from how they lie before it."""
    handle = _FLOWS.get(role(node, modules), _other)
    return handle(node, modules, layouts)


def operand(node: fx.Node) -> fx.Node | None:
    """What a step with one feature map works on: its first argument, or the one it is given by name."""
    values = [*node.args, *node.kwargs.values()]
    return values[0] if values and isinstance(values[0], fx.Node) else None


def operands(node: fx.Node) -> list[Any]:
    """The two things that a sum or a product is of, or the list that a concatenation is of."""
    if node.target in _CONCATENATIONS:
        given = node.args[0] if node.args else node.kwargs.get("tensors")
        return list(given) if isinstance(given, list | tuple) else []
    return [*node.args, *node.kwargs.values()][:2]


def halves(node: fx.Node, modules: Modules) -> bool:
    """Whether a step takes the maximum or mean of 2×2 pixels that are one pixel of the low stream."""
    if node.op == "call_module":
        pool = modules[str(node.target)]
        names = ("kernel_size", "stride", "padding", "dilation", "return_indices", "divisor_override")
        given = {name: getattr(pool, name) for name in names if hasattr(pool, name)}
        is_pool = isinstance(pool, nn.MaxPool2d | nn.AvgPool2d)
    else:
        given = {**dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)), **node.kwargs}
        is_pool = node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d) and len(node.args) <= 4
    usual = {"padding": 0, "dilation": 1, "return_indices": False, "divisor_override": None}
    if not is_pool or not all(
        given.get(name, value) in (value, (value,) * 2, [value] * 2) for name, value in usual.items()
    ):
        return False
    kernel = given.get("kernel_size")
    return all(value in (2, (2, 2), [2, 2]) for value in (kernel, given.get("stride") or kernel))


def _is_spatial_mean(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def _input(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    if node.op != "get_attr":
        return Flow(Layout())
    path, _, name = str(node.target).rpartition(".")
    value = getattr(modules.get(path), name, None)
    if isinstance(value, torch.Tensor) and value.dim() >= 3 and value.shape[-2:] == (1, 1):
        return Flow(Layout(value.shape[-3], is_point=True))  # one number for every channel
    return Flow(Layout())


def _octave(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    block = modules[str(node.target)]
    assert isinstance(block, OctaveConv)
    return Flow(Layout(block.spec.c_out, block.low_out), _unfit(node, layouts, block.low_in))


def _unfit(node: fx.Node, layouts: Layouts, wanted: Ranges) -> str | None:
    """Say why the streams that an octave conv finds are not those it reads."""
    source = operand(node)
    found = layouts[source] if source is not None else Layout()
    if found.low == wanted or (found.is_fine and not wanted):
        return None
    if not found.low:
        return "it takes a plain map apart"
    return "it takes other channels apart than those that come" if wanted else "it reads high channels only"


def _conv(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    conv, source = modules[str(node.target)], operand(node)
    is_pointwise = isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1)
    is_point = source is not None and layouts[source].is_point and is_pointwise
    return replace(_other(node, modules, layouts), layout=Layout(conv.out_channels, is_point=is_point))  # type: ignore[arg-type]


def _norm(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    norm = modules[str(node.target)]
    source = operand(node)
    assert isinstance(norm, nn.BatchNorm2d)
    before = layouts[source] if source is not None else Layout()
    return Flow(replace(before, channels=norm.num_features))


def _elementwise(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    source = operand(node)
    others = [value for value in [*node.args[1:], *node.kwargs.values()] if value is not source]
    if source is None or any(isinstance(value, fx.Node) and layouts[value].low for value in others):
        return _other(node, modules, layouts)
    return Flow(layouts[source])


def _low_pass(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    source, low = node.args
    assert isinstance(source, fx.Node)
    return Flow(replace(layouts[source], low=tuple(tuple(r) for r in low), is_fine=False))  # type: ignore[arg-type,union-attr]


def _sum(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    """A sum of two octave maps is one; a plain map that is added to one has to be low-passed for that."""
    nodes = [value for value in operands(node) if isinstance(value, fx.Node)]
    maps = [value for value in nodes if not layouts[value].is_point]
    octave = [value for value in maps if layouts[value].is_octave]
    if len(maps) == 2 and len(octave) == 1 and len(nodes) == 2:
        plain = next(value for value in maps if value not in octave)
        if not layouts[plain].low:
            return Flow(layouts[octave[0]], low_pass=(plain,))
    return _product(node, modules, layouts)


def _product(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    """Two maps with the same low channels, or a map and numbers, one for all or one for every channel."""
    nodes = [value for value in operands(node) if isinstance(value, fx.Node)]
    maps = [layouts[value] for value in nodes if not layouts[value].is_point]
    points = [layouts[value] for value in nodes if layouts[value].is_point]
    if not any(layout.low for layout in maps):
        channels = next((one.channels for one in maps + points if one.channels), None)
        return Flow(Layout(channels, is_point=bool(points) and not maps))
    first = maps[0]
    is_alike = all((one.low, one.is_fine) == (first.low, first.is_fine) for one in maps)
    if is_alike and all(one.channels in (first.channels, 1) or one.low == first.low for one in points):
        return Flow(first)
    joined = _other(node, modules, layouts)
    channels = next((one.channels for one in maps if one.channels), None)
    return replace(
        joined, layout=Layout(channels), seam=joined.seam and f"'{node.name}' adds or multiplies other streams"
    )


def _concat(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    """Channels side by side; of a plain map all are high."""
    parts = operands(node)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim not in (1, -3) or not parts or not all(isinstance(part, fx.Node) for part in parts):
        return _other(node, modules, layouts)
    found = [layouts[part] if layouts[part].is_octave else layouts[part].plain for part in parts]
    counts = [one.channels for one in found]
    if any(count is None for count in counts):
        joined = _other(node, modules, layouts)
        return replace(joined, seam=joined.seam and f"how many channels '{node.name}' puts side by side is not known")
    low: list[tuple[int, int]] = []
    at = 0
    for one, count in zip(found, counts, strict=True):
        low += streams.moved(one.low, at)
        at += count or 0
    return Flow(Layout(at, streams.merged(low), is_point=all(one.is_point for one in found)))


def _spatial(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    """Pooling makes one resolution of both: what is low goes there as up(l), or as l where it has it already."""
    source = operand(node)
    if source is None:
        return _other(node, modules, layouts)
    before = layouts[source]
    return Flow(replace(before, is_fine=bool(before.low), is_point=_to_a_point(node, modules)))


def _to_a_point(node: fx.Node, modules: Modules) -> bool:
    if node.op == "call_module":
        pool = modules[str(node.target)]
        return isinstance(pool, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and pool.output_size in (1, (1, 1))
    if node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        return [*node.args[1:], *node.kwargs.values()][:1] in ([1], [(1, 1)], [[1, 1]])
    return "mean" in str(node.target) and bool(node.kwargs.get("keepdim", False) or True in node.args[2:])


def _other(node: fx.Node, modules: Modules, layouts: Layouts) -> Flow:
    octave = [value for value in node.all_input_nodes if layouts[value].is_octave]
    return Flow(Layout(), f"'{node.name}' needs the whole map" if octave else None)


_FLOWS: dict[str, Callable[[fx.Node, Modules, Layouts], Flow]] = {
    "input": _input,
    "octave": _octave,
    "conv": _conv,
    "norm": _norm,
    "elementwise": _elementwise,
    "low_pass": _low_pass,
    "sum": _sum,
    "product": _product,
    "concat": _concat,
    "spatial": _spatial,
}
