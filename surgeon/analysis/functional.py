"""Functional convolutions: calls of `F.conv2d(x, self.weight, …)` that no module makes.

Such a call is a step in an island's graph. Where its weight is a parameter, it can become a module (`lift_`): a conv
that holds the same parameters, under a name of its own beside them, and a graph that calls it. From then on it is a
conv like any other. A weight that is computed during the forward pass has no stored numbers that a block could take
over, so such a call stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgeon._torch_compat import ConvNd
from surgeon.analysis import rewritten as graph
from surgeon.analysis.islands import Island
from surgeon.analysis.uses import own_reader
from surgeon.conv.spec import ConvSpec, Pair

_ARGUMENTS = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1
        }.items()
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Functional:
    """A functional convolution: the name that its module gets, and where its parts are, relative to the island."""

    path: str
    spec: ConvSpec | None  # None where the weight is computed
    island: str
    step: str
    weight: str = ""
    bias: str = ""
    obstacle: str | None = None


def find(model: nn.Module, island: Island, custom_call: Callable[[nn.Module, str], str | None]) -> list[Functional]:
    """List the functional convolutions of an island; those that use the weight of a conv belong to that conv."""
    root = model.get_submodule(island.path)
    nodes = [node for node in island.graph.nodes if node.target is torch.conv2d]
    if not nodes:
        return []
    why = graph.obstacle(root, island.graph, custom_call) or graph.unwritable(root, island.graph)
    return list(_described(model, root, island, nodes, why))


def _described(
    model: nn.Module, root: nn.Module, island: Island, nodes: Sequence[fx.Node], why: str | None
) -> Iterator[Functional]:
    for node in nodes:
        given = arguments(node)
        kernel, bias = (given[name] for name in ("weight", "bias"))
        target = str(kernel.target) if isinstance(kernel, fx.Node) and kernel.op == "get_attr" else ""
        held = _parameter(root, target)
        path = _free_name(model, island.path, target.rpartition(".")[0], node.name)
        bias_target = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else ""
        if held is None or (bias is not None and _parameter(root, bias_target) is None):
            kept = _is_buffer(root, target) or _is_buffer(root, bias_target)
            how = "a buffer, and only parameters can go into a module" if kept else "computed during the forward pass"
            weight = "" if held is None else target
            yield Functional(path, None, island.path, node.name, weight, obstacle=f"its weight or bias is {how}")
        elif any(isinstance(given[name], fx.Node) for name in ("stride", "padding", "dilation", "groups")):
            yield Functional(
                path, None, island.path, node.name, target, obstacle="its geometry is computed during the forward pass"
            )
        elif not isinstance(root.get_submodule(target.rpartition(".")[0]), ConvNd):
            spec = _spec(held, given, has_bias=bias is not None)
            held_back = _shared(root, kernel) or _read_by_its_class(root, target, bias_target)
            yield Functional(path, spec, island.path, node.name, target, bias_target, obstacle=held_back or why)


def conv_of(model: nn.Module, one: Functional) -> nn.Conv2d:
    """Make the conv that a functional convolution stands for, with the same parameters."""
    assert one.spec is not None
    root = model.get_submodule(one.island)
    weight, bias = _parameter(root, one.weight), _parameter(root, one.bias)
    assert weight is not None
    conv = one.spec.build(like=torch.empty(0, dtype=weight.dtype, device="meta"))
    conv.weight, conv.bias = weight, bias
    return conv.train(root.training)


def lift_(
    model: nn.Module, made: Sequence[tuple[Functional, nn.Module]], islands: Sequence[Island]
) -> list[Callable[[], None]]:
    """Replace functional convolutions by modules, and remove the parameters that these have taken over.

    Returns functions that undo this, in the order in which it was done.
    """
    undos: list[Callable[[], None]] = []
    graphs = {island.path: island.graph for island in islands}
    for path in dict.fromkeys(one.island for one, _ in made):
        root, own = model.get_submodule(path), [(one, module) for one, module in made if one.island == path]
        new = fx.Graph()
        new.output(new.graph_copy(graphs[path], {}))
        nodes = {node.name: node for node in new.nodes}
        for one, module in own:
            undos.append(_hold_(model, root, one, module))
            _call_(new, nodes[one.step], one.path.removeprefix(f"{path}." if path else ""))
        undos.append(graph.rewrite_(root, new))
    return undos


def arguments(node: fx.Node) -> dict[str, Any]:
    """Give the arguments of a call of F.conv2d by name."""
    bound = _ARGUMENTS.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _call_(new: fx.Graph, node: fx.Node, target: str) -> None:
    """Let a step call a module instead, and drop the parameters that only it has read."""
    given = arguments(node)
    with new.inserting_before(node):
        called = new.call_module(target, (given["input"],))
    node.replace_all_uses_with(called)
    new.erase_node(node)
    for part in (given["weight"], given["bias"]):
        if isinstance(part, fx.Node) and not part.users:
            new.erase_node(part)


def _hold_(model: nn.Module, root: nn.Module, one: Functional, module: nn.Module) -> Callable[[], None]:
    parent, _, name = one.path.rpartition(".")
    holder = model.get_submodule(parent)
    holder.add_module(name, module)
    taken = []
    for target in (one.weight, one.bias):
        if target:
            owner, _, key = target.rpartition(".")
            parameters = root.get_submodule(owner)._parameters
            taken.append((parameters, key, parameters.pop(key)))

    def undo() -> None:
        del holder._modules[name]
        for parameters, key, parameter in taken:
            parameters[key] = parameter

    return undo


def _parameter(root: nn.Module, target: str) -> nn.Parameter | None:
    owner, _, name = target.rpartition(".")
    try:
        found = getattr(root.get_submodule(owner), name, None) if target else None
    except AttributeError:
        return None
    return found if isinstance(found, nn.Parameter) else None


def _read_by_its_class(root: nn.Module, *targets: str) -> str | None:
    """Say which method of torch's, that a class has its own of, would miss a parameter that goes into a module."""
    for target in filter(None, targets):
        owner, _, name = target.rpartition(".")
        kind = type(root.get_submodule(owner))
        if (method := own_reader(kind, name)) is not None:
            return f"{kind.__name__} has its own {method}, which reads '{name}'"
    return None


def _is_buffer(root: nn.Module, target: str) -> bool:
    return target in dict(root.named_buffers(remove_duplicate=False))


def _spec(weight: nn.Parameter, given: dict[str, Any], *, has_bias: bool) -> ConvSpec:
    c_out, c_in, kh, kw = weight.shape
    padding = given["padding"] if isinstance(given["padding"], str) else _pair(given["padding"])
    return ConvSpec(
        c_in * given["groups"],
        c_out,
        (kh, kw),
        stride=_pair(given["stride"]),
        padding=padding,
        dilation=_pair(given["dilation"]),
        groups=given["groups"],
        bias=has_bias,
    )


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _shared(root: nn.Module, weight: fx.Node) -> str | None:
    """Say what else uses a weight: other steps, or another module that holds it."""
    readers = [user for node in weight.graph.nodes if node.target == weight.target for user in node.users]
    if len(readers) > 1:
        return f"{len(readers)} steps read its weight"
    held = _parameter(root, str(weight.target))
    owners = [m for m in root.modules() for p in m.parameters(recurse=False) if p is held]
    return "its weight is held under two names" if len(owners) > 1 else None


def _free_name(model: nn.Module, island: str, holder: str, step: str) -> str:
    """Name a module after the step, beside the parameters; underscores are added until the name is free."""
    parent = ".".join(part for part in (island, holder) if part)
    module = model.get_submodule(parent)
    module, parent = (
        (module, parent) if not isinstance(module, nn.ParameterList) else (model.get_submodule(island), island)
    )
    name = step
    while hasattr(module, name):
        name += "_"
    return f"{parent}.{name}" if parent else name
