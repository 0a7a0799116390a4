"""The sum of a spatial and a 1×1 conv, as a module that is torch's own: a `torch.fx.GraphModule` with a known graph.

    y = spatial(x) + pointwise(x)                                   one after the other, in the order of x
    y = spatial(x[channel_order])[filter_place] + pointwise(x)      where the groups of `spatial` are no runs of x

A 1×1 conv at every pixel is a matrix product, which adds its result as it goes along. In channels_last both maps are
matrices as they lie, so that no further map is written; in the ordinary format the same is right, and slow:

    pixels(y) = pixels(spatial(x)) + pixels(x) · pointwiseᵀ      for a 1×1 conv without bias, stride or padding

No module of torch adds the results of two others, and a class of surgeon's would have to be installed where the network
is deployed. So the sum is a graph. torch saves a graph as Python source, which runs when torch opens the file. surgeon
never runs that source: `rebuild` compares it, as a syntax tree, with what torch writes for these graphs, and makes
the module from its own graph. Any other source is refused.
"""

from __future__ import annotations

import ast
import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.blocks.anatomy import BranchKernel
from surgeon.conv import kernels
from surgeon.conv.affine import regrouped
from surgeon.conv.spec import ConvSpec, Pads

REDUCE = "torch.fx.graph_module.reduce_graph_module"  # what torch.save writes that a GraphModule is made by
TRACER = "torch.fx._symbolic_trace.Tracer"  # what it holds once torch itself has opened it
CODE = "_code"
CONVS, ORDERS = frozenset({"spatial", "pointwise"}), frozenset({"channel_order", "filter_place"})
CONV, MATRIX = frozenset({"spatial"}), frozenset({"pointwise"})  # of a product
# What a GraphModule has beyond other modules. None of it is read.
OF_GRAPHS = frozenset(
    {"_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras", "_graphmodule_cls_name", "meta"}
    | {"_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env"}
)
OF_MODULES = frozenset(vars(nn.Module()))
# What torch imports around a graph, whether the graph uses it or not.
_IMPORTS = """
NoneType = type(None)
from math import inf
from math import nan
from torch import device
import torch
import torch.fx._pytree as fx_pytree
import torch.utils._pytree as pytree
"""
_LONGEST = 2000  # characters that are parsed


def make(
    spatial: nn.Module,
    pointwise: nn.Module | nn.Parameter,
    *,
    channel_order: Tensor | None = None,
    filter_place: Tensor | None = None,
) -> fx.GraphModule:
    """Make the sum of two modules, or of a module and a product with a matrix (out, in).

    The orders of channels and filters around `spatial` are both given, or none.

    >>> x = torch.randn(1, 4, 5, 5)
    >>> spatial, pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)
    >>> bool((make(spatial, pointwise)(x) == spatial(x) + pointwise(x)).all())
    True
    """
    held: dict[str, Any] = {"spatial": spatial, "pointwise": pointwise}
    if channel_order is not None:
        held |= {"channel_order": channel_order, "filter_place": filter_place}
    is_product = isinstance(pointwise, nn.Parameter)
    return fx.GraphModule(held, _graph(is_ordered=channel_order is not None, is_product=is_product))


def seeing(conv: nn.Conv2d, shift: Pads | None, mode: str) -> nn.Module:
    """Let a 1×1 conv see a shifted map, where its own padding cannot do that.

    Kernels are odd, so both borders of an axis are alike, and an axis is either cropped or padded.
    """
    if shift is None:
        return conv
    top, _, left, _ = shift
    padded = ConvSpec.of(conv).change(padding=(max(top, 0), max(left, 0)), padding_mode=mode)
    crop = (min(left, 0), min(left, 0), min(top, 0), min(top, 0))  # last axis first
    made = padded.build_with(conv.weight.detach(), conv.bias, like=conv.weight)
    return nn.Sequential(nn.ZeroPad2d(crop), made)


def is_ours(module: nn.Module) -> bool:
    """Whether a module is such a sum, with nothing added to it that a file may not hold."""
    if not isinstance(module, fx.GraphModule) or type(module).__mro__[1] is not fx.GraphModule:
        return False
    if vars(module).keys() - OF_MODULES - OF_GRAPHS - {"_graph"}:
        return False
    return _is_known(module.code, *(frozenset(one) for one in (module._buffers, module._modules, module._parameters)))


def knows(
    code: object, imports: object, buffers: frozenset[str], modules: frozenset[str], parameters: frozenset[str]
) -> bool:
    """Whether the source in a file is that of a sum, and whether it holds what a sum holds."""
    if not isinstance(code, str) or not isinstance(imports, str) or not _is_known(code, buffers, modules, parameters):
        return False
    return _statements(imports) <= _statements(_IMPORTS) | _statements(_imports_of_today())


def rebuild(body: Mapping[str, Any], imports: str) -> fx.GraphModule:
    """Make the sum whose state and source are in a file; the source is compared, and not run.

    Raises:
        ValueError: it is no sum, or holds what a sum does not hold.
    """
    buffers, modules, parameters = body["_buffers"], body["_modules"], body["_parameters"]
    if not knows(body[CODE], imports, *map(frozenset, (buffers, modules, parameters))):
        raise ValueError("a GraphModule in it is none that surgeon writes")
    if not all(isinstance(one, nn.Module) for one in modules.values()):
        raise ValueError("a GraphModule in it holds something else in place of modules")
    if not all(isinstance(one, nn.Parameter) and one.dim() == 2 for one in parameters.values()):
        raise ValueError("a GraphModule in it holds something else in place of a matrix")
    if not all(map(is_order, buffers.values())):
        raise ValueError("a GraphModule in it holds something else in place of an order of channels")
    made = make(**modules, **parameters, **buffers)
    vars(made).update((name, value) for name, value in body.items() if name in OF_MODULES)
    return made


def branch_kernels(module: fx.GraphModule) -> list[BranchKernel]:
    """Give the kernels of both convs, in the order of channels and filters that the sum has."""
    spatial, pointwise = module.get_submodule("spatial"), getattr(module, "pointwise", None)
    assert isinstance(spatial, nn.Conv2d)
    kernel = regrouped(spatial.weight.detach().double(), spatial.groups, 1)
    if (order := module._buffers.get("channel_order")) is not None:
        kernel = kernel[module.get_buffer("filter_place")][:, order.argsort()]
    if not isinstance(pointwise, nn.Parameter):
        conv = next(one for one in module.get_submodule("pointwise").modules() if isinstance(one, nn.Conv2d))
        taps = conv.weight.detach().double()
    else:
        taps = pointwise.detach().double()[:, :, None, None]
    kh, kw = spatial.kernel_size
    centre = kernels.embed(taps, (kh, kw), row=kh // 2, column=kw // 2)
    return [BranchKernel(f"{kh}x{kw}", kernel), BranchKernel("1x1", centre)]


def is_order(value: object) -> bool:
    """Whether something is a tensor of the numbers from 0 on, each once."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        return False
    return value.is_meta or torch.equal(value.sort().values, torch.arange(len(value), device=value.device))


def _graph(*, is_ordered: bool, is_product: bool) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("input")
    seen = graph.call_method("index_select", (x, 1, graph.get_attr("channel_order"))) if is_ordered else x
    spatial = graph.call_module("spatial", (seen,))
    if is_ordered:
        spatial = graph.call_method("index_select", (spatial, 1, graph.get_attr("filter_place")))
    if not is_product:
        graph.output(graph.call_function(operator.add, (spatial, graph.call_module("pointwise", (x,)))))
        return graph
    last, pixels = (graph.call_method("permute", (one, 0, 2, 3, 1)) for one in (spatial, x))
    rows, seen = (graph.call_method("flatten", (one, 0, 2)) for one in (last, pixels))
    weight = graph.call_method("t", (graph.get_attr("pointwise"),))
    made = graph.call_function(torch.addmm, (rows, seen, weight))
    graph.output(graph.call_method("permute", (graph.call_method("view_as", (made, last)), 0, 3, 1, 2)))
    return graph


@functools.cache
def _known(*, is_ordered: bool, is_product: bool) -> str:
    """The syntax tree of the source that torch writes for one of the graphs."""
    with warnings.catch_warnings():  # there is no module yet that has the weight
        warnings.simplefilter("ignore")
        return _tree(_graph(is_ordered=is_ordered, is_product=is_product).python_code("self").src)


@functools.cache
def _imports_of_today() -> str:
    """What the installed torch imports around a graph."""
    imports: str = make(nn.Identity(), nn.Identity()).__reduce__()[1][1]
    return imports


def _is_known(code: str, buffers: frozenset[str], modules: frozenset[str], parameters: frozenset[str]) -> bool:
    """Whether a source is that of a sum which holds such things."""
    ways = {(CONVS, frozenset[str]()): False, (CONV, MATRIX): True}
    if (modules, parameters) not in ways or buffers not in (frozenset(), ORDERS) or len(code) >= _LONGEST:
        return False
    try:
        return _tree(code) == _known(is_ordered=bool(buffers), is_product=ways[modules, parameters])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _tree(code: str) -> str:
    return ast.dump(ast.parse(code))


def _statements(code: str) -> set[str]:
    try:
        return {ast.dump(one) for one in ast.parse(code).body} if len(code) < _LONGEST else {code}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {code}
