"""Are A and the replay equal for every input, and not only for those that are run? Their graphs are compared.

Two steps give the same for every input of the network if

- they are the same step (function, or module with the same code and numbers), and all that they read is the same; or
- each is an affine function of one earlier step, these two are the same, and the two operators are (`operators`).

So it goes from the outputs back to the inputs. The second is tried where the first does not hold, with the nearest
steps first: a block and the conv that it was folded to, a conv with its norm, branches that were added up.

A graph is what a module computes if tracing it can be believed (`analysis.trace`). Of what it holds, only modules count
as affine whose class is torch's, surgeon's, or known to be a conv or a norm, and that nobody has attached a hook or a
forward of its own to. Where that is not known, nothing is said, and the inputs that are run have to show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.analysis import convs
from surgeon.analysis.in_place import base_of, written_by
from surgeon.analysis.islands import capture
from surgeon.analysis.obstacles import custom_call
from surgeon.analysis.program import REMEMBERS, SURROUNDINGS
from surgeon.blocks import norms
from surgeon.conv.spec import ConvSpec
from surgeon.models.call import Inputs
from surgeon.models.sandbox import quietly
from surgeon.proof import alike, operators
from surgeon.proof.linearity import NotLinearError
from surgeon.proof.operators import Agreement

_LONGEST = 64  # steps that one affine part may have
_AFFINE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d),
    *(nn.ReplicationPad2d, nn.CircularPad2d, nn.ChannelShuffle, nn.Sequential, nn.ModuleList, nn.ModuleDict),
)
_STEPS = frozenset(
    {
        *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "neg", "cat", "concat", "concatenate", "getitem"),
        *("conv2d", "pad", "avg_pool2d", "chunk", "split", "permute", "flatten", "t", "addmm", "view_as", "add_"),
        *("index_select", "contiguous", "clone", "detach", "channel_shuffle", "mul_", "sub_"),
    }
)


@dataclass(frozen=True, slots=True)
class EveryInput:
    """What was shown for every input: by the name of its first module, how each part that is folded agrees with A's.

    `unknown` are modules that A and the replay do not have alike, and of which nothing was shown. `is_whole`: the
    networks are equal for every input, so that none is needed; else `in_the_way` says why, where nothing is unknown.
    """

    parts: Mapping[str, Agreement]
    unknown: tuple[str, ...]
    is_whole: bool
    in_the_way: str = "the code around them could not be followed"


def prove(a: nn.Module, replay: nn.Module, unlike: Sequence[str] | None, inputs: Inputs) -> EveryInput | None:
    """Compare two models in float64 and eval mode; `unlike` are the modules that they do not certainly have alike.

    None where there is nothing to compare.
    """
    if not unlike:
        return None
    with quietly():
        graphs = [{one.path: one.graph for one in capture(model, inputs).islands} for model in (a, replay)]
        parts: dict[str, Agreement] = {}
        seen: set[str] = set()
        is_whole = graphs[0].keys() == graphs[1].keys() == {""} and not any(map(_is_watched, (a, replay)))
        for path in graphs[0].keys() & graphs[1].keys():
            if any(_is_in(one, path) or _is_in(path, one) for one in unlike):
                sides = [_Side(model, path, graph[path]) for model, graph in zip((a, replay), graphs, strict=True)]
                pair = _Pair(*sides)
                is_whole &= pair.is_same()
                parts |= pair.parts
                seen |= pair.seen
    unknown = tuple(path for path in unlike if not any(_is_in(one, path) for one in seen))
    return EveryInput(parts, unknown, is_whole and all(one.holds for one in parts.values())) if parts else None


def _is_in(path: str, other: str) -> bool:
    """Whether a module is another one, or lies in it."""
    return not other or path == other or path.startswith(f"{other}.")


def _is_watched(model: nn.Module) -> bool:
    """Whether anything may happen in a call that no graph shows."""
    return any(custom_call(module, "it") is not None for module in model.modules())


class _Side:
    """An island of one of the models."""

    def __init__(self, model: nn.Module, path: str, graph: fx.Graph) -> None:
        self.path, self.root, self.graph = path, model.get_submodule(path), graph
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.output: fx.Node = next(reversed(graph.nodes))
        self.device = next((one.device for one in self.root.parameters()), torch.device("cpu"))
        self._constant: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            reads = node.all_input_nodes
            is_call = node.op in ("call_function", "call_method") and bool(reads)
            self._constant[node] = node.op == "get_attr" or (is_call and all(map(self._constant.__getitem__, reads)))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def name_of(self, node: fx.Node) -> str:
        return f"{self.path}.{node.target}".lstrip(".")

    def seen_through(self, node: fx.Node) -> fx.Node:
        """Give the step whose result a step gives as it is."""
        while type(module := self.module(node)) is nn.Identity and custom_call(module, "it") is None:
            (node,) = node.all_input_nodes
        return node

    def is_plain(self) -> bool:
        """Whether the names in the graph tell what is read: nothing changes what a later step reads by another name."""
        if any(one.meta.get(SURROUNDINGS) or one.meta.get(REMEMBERS) for one in self.order):
            return False
        at_base: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            at_base[base_of(node, self.modules)].append(node)
        for known in at_base.values():
            for node in known:
                if (target := written_by(node, self.modules)) is None:
                    continue
                at = self.order[node]
                earlier = [one for one in known if self.order[one] < at]
                if any(self.order[user] > at for one in earlier for user in one.users):
                    return False
                if base_of(target, self.modules).op in ("placeholder", "get_attr"):
                    return False
        return True

    def cuts(self, sink: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Give every earlier step of which a step may be an affine function, and the steps behind it; nearest first."""
        inside: list[fx.Node] = []
        reads, latest = {sink}, sink
        while self._may_be_affine(latest) and len(inside) < _LONGEST:
            inside.append(latest)
            reads = (reads - {latest}) | {one for one in latest.all_input_nodes if not self._constant[one]}
            if not reads:
                return
            latest = max(reads, key=self.order.__getitem__)
            if len(reads) == 1:
                yield latest, inside[::-1]

    def _may_be_affine(self, node: fx.Node) -> bool:
        """Whether a step may be one; what is certain is what its run shows (`linearity`)."""
        if (module := self.module(node)) is not None:
            return _is_known(module)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in _STEPS

    def alone(self, source: fx.Node, inside: Sequence[fx.Node]) -> fx.GraphModule:
        """Give steps as a module of their own, with the constants that they read."""
        graph = fx.Graph()
        made = {source: graph.placeholder("x")}
        wanted, waiting = set(inside), list(inside)
        while waiting:
            more = [one for one in waiting.pop().all_input_nodes if self._constant[one] and one not in wanted]
            wanted |= {*more}
            waiting += more
        for node in sorted(wanted, key=self.order.__getitem__):
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(made[inside[-1]])
        return fx.GraphModule(self.root, graph)

    def channels(self, source: fx.Node, inside: Sequence[fx.Node]) -> int | None:
        """How many channels a map has that steps read; None where no module says that."""
        found = (_channels(self.module(node)) for node in inside if source in node.all_input_nodes)
        return next((one for one in found if one is not None), None)


class _Pair:
    """The same island of both models; `parts` and `seen` say what was found."""

    def __init__(self, a: _Side, b: _Side) -> None:
        self.a, self.b = a, b
        self.parts: dict[str, Agreement] = {}
        self.seen: set[str] = set()  # modules of A in parts
        self._known: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._failed: list[tuple[str, Agreement, list[str]]] = []

    def is_same(self) -> bool:
        """Whether both give the same for every input."""
        if not (self.a.is_plain() and self.b.is_plain()):
            return False
        by_name = {node.name: node for node in self.b.order}
        try:
            for node in self.a.order:  # in order, so that no question leads far back
                other = by_name.get(node.name)
                if other is not None and not self.a._may_be_affine(node) and node.op != "output":
                    self._are_same(node, other)
            found = self._are_all_same(self.a.output.args, self.b.output.args, is_only=_is_one(self.a.output))
        except RecursionError:
            return False
        for name, agreement, paths in self._failed:
            self.parts[name] = agreement
            self.seen |= {*paths}
        return found

    def _are_same(self, one: fx.Node, other: fx.Node, *, is_only: bool = False) -> bool:
        """Whether two steps give the same; `is_only` says that nothing else can be what the other reads."""
        is_at_same = one.op == other.op == "call_module" and one.target == other.target
        one, other = self.a.seen_through(one), self.b.seen_through(other)
        if (one, other) not in self._known:
            self._known[one, other] = False  # a graph has no circles
            failed = len(self._failed)
            found = self._are_same_step(one, other) or self._are_same_part(one, other, is_at_same or is_only)
            if found:
                del self._failed[failed:]
            self._known[one, other] = found
        return self._known[one, other]

    def _are_same_step(self, one: fx.Node, other: fx.Node) -> bool:
        if one.op != other.op or one.op == "output":
            return False
        if one.op == "call_module":
            modules = self.a.module(one), self.b.module(other)
            if modules[0] is None or modules[1] is None or not alike.is_alike([modules[0]], [modules[1]]):
                return False
        elif one.op == "get_attr":
            mine, theirs = _attribute(self.a.root, one), _attribute(self.b.root, other)
            return mine is not None and alike.is_equal(mine, theirs)
        elif one.target != other.target:
            return False
        is_only = one.name == other.name and _is_one(one) and _is_one(other)
        return self._are_all_same([one.args, one.kwargs], [other.args, other.kwargs], is_only=is_only)

    def _are_all_same(self, one: Any, other: Any, *, is_only: bool = False) -> bool:
        """Whether two arguments, or what holds several, are the same."""
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            return self._are_same(one, other, is_only=is_only)
        if isinstance(one, slice) and isinstance(other, slice):
            one, other = [one.start, one.stop, one.step], [other.start, other.stop, other.step]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            one, other = ([*many.keys(), *many.values()] for many in (one, other))
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            same = [self._are_all_same(*both, is_only=is_only) for both in zip(one, other, strict=False)]
            return len(one) == len(other) and all(same)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return alike.is_equal(one, other)
        return type(one) is type(other) and not isinstance(one, fx.Node) and bool(one == other)

    def _are_same_part(self, one: fx.Node, other: fx.Node, is_certain: bool) -> bool:
        """Whether two steps are the same affine function of the same earlier step."""
        for source, inside in self.a.cuts(one):
            for source_b, inside_b in self.b.cuts(other):
                if not self._are_same(source, source_b):
                    continue
                channels = self.a.channels(source, inside) or self.b.channels(source_b, inside_b)
                if channels is None:
                    continue
                sides = self.a.alone(source, inside), self.b.alone(source_b, inside_b)
                try:
                    found = operators.compare(*sides, channels, self.a.device)
                except NotLinearError:
                    return False
                paths = [self.a.name_of(node) for node in inside if node.op == "call_module"]
                paths += [self.b.name_of(node) for node in inside_b if node.op == "call_module"]
                if found.holds:
                    self.parts[paths[0]] = found
                    self.seen |= {*paths}
                    return True
                if is_certain and not self._failed:
                    self._failed.append((paths[0], found, paths))
        return False


def _is_one(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1


def _is_known(module: nn.Module) -> bool:
    """Whether the class of a module, and of all in it, says what it computes, and nothing was attached to it."""
    return all(_is_known_class(one) and custom_call(one, "it") is None and not one.training for one in module.modules())


def _is_known_class(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return isinstance(convs.read(module), ConvSpec)
    is_ours = type(module).__module__.startswith("surgeon.") and not isinstance(module, norms.HasRest)
    return type(module) in _AFFINE or is_ours or norms.is_batch_norm(module)


def _channels(module: nn.Module | None) -> int | None:
    """How many channels a module reads."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    if module is not None and norms.is_batch_norm(module):
        var = getattr(norms.core_of(module), "running_var", None)
        return len(var) if isinstance(var, Tensor) else None
    spec = vars(module).get("spec") if module is not None else None
    return spec.c_in if isinstance(spec, ConvSpec) else None


def _attribute(root: nn.Module, node: fx.Node) -> Tensor | None:
    found: Any = root
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None
