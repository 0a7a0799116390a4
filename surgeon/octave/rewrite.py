"""Octave seams out of a graph, by exact rewriting.

A seam is where an octave pair is joined into one map only to be split again. Every octave conv begins as
join ∘ core ∘ split; here joins are moved down through the graph until they meet a split, which undoes them:

    split(join(h, l)) = (h, l)

What a step of the graph is to two streams `channelwise` says; here is one rule for each, with its equation. In eval
mode they are exact bit by bit: no number is computed otherwise than before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx, nn

from surgeon.analysis import program as graph
from surgeon.analysis.islands import Island
from surgeon.analysis.obstacles import custom_call
from surgeon.analysis.trace import FOLLOWS_MODE
from surgeon.blocks.octave import OctaveConv, TwoStreams
from surgeon.blocks.pairs import make_pair_norm_
from surgeon.conv import streams
from surgeon.conv.streams import Ranges
from surgeon.octave import layout as channelwise
from surgeon.octave.layout import Layout

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True, slots=True)
class Seam:
    """A place in an island where two streams are joined, or one map is split, and why it has to be."""

    island: str
    kind: Literal["join", "split", "local"]  # local: the island was left as it is
    reason: str


@dataclass(frozen=True, slots=True)
class LowPass:
    """An operand of a step that is low-passed there: a plain map that is added to an octave one."""

    island: str
    step: str
    operand: str


@dataclass(slots=True)
class Outcome:
    """What was done to a model: the seams that are left, how often each rule was used, and how to take it all back."""

    seams: list[Seam] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    rewritten: tuple[str, ...] = ()  # islands that have become graphs
    undos: list[Callable[[], None]] = field(default_factory=list)

    def undo_(self) -> None:
        for undo in reversed(self.undos):
            undo()
        self.undos.clear()


def remove_(
    model: nn.Module, islands: Sequence[Island], low_passes: Sequence[LowPass] = (), *, only_low_pass: bool = False
) -> Outcome:
    """Rewrite those of a model's islands that hold octave convs.

    `low_passes` come from the plan. With `only_low_pass` they are put in, and every conv still splits and joins.
    """
    outcome = Outcome()
    for island in islands:
        root = model.get_submodule(island.path)
        blocks = [m for m in root.modules() if isinstance(m, OctaveConv) and not m.keeps_seams]
        if not blocks:
            continue
        own = [one for one in low_passes if one.island == island.path]
        rewriting = _Rewriting(root, island)
        rewriting.low_pass_(own)
        if not only_low_pass:
            rewriting.walk()
        if not (own or rewriting.has_gained):
            continue
        if why := _obstacle(root, island, rewriting):
            outcome.seams.append(Seam(island.path, "local", why))
            continue
        outcome.undos += [make_pair_norm_(root.get_submodule(path), low) for path, low in rewriting.norms.items()]
        outcome.undos.append(graph.rewrite_(root, rewriting.graph))
        outcome.seams += rewriting.seams
        outcome.fired += rewriting.fired
        outcome.rewritten += (island.path,)
    return outcome


def deploy_(model: nn.Module) -> None:
    """Tidy the graphs of a model whose blocks are deployed: no Identities, and sums that write where they can."""
    for module in model.modules():
        if isinstance(module, graph.Rewritten):
            new, modules = module.graph, dict(module.named_modules(remove_duplicate=False))
            _drop_identities_(new, modules)
            for node in new.nodes:
                if _adds_to_its_own(node, modules):
                    node.target = streams.add_into
            graph.rewrite_(module, new)


def _drop_identities_(new: fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(new.nodes):
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.Identity:
            continue
        given = node.args[0]
        if isinstance(given, fx.Node):
            node.replace_all_uses_with(given)
        else:  # a pair, of which its readers take the parts
            for part in list(node.users):
                part.replace_all_uses_with(given[part.args[1]])
                new.erase_node(part)
        new.erase_node(node)


def _adds_to_its_own(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a step adds to what a conv has just made for it alone."""
    if node.target not in (operator.add, torch.add) or node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or len(first.users) > 1:
        return False
    maker = first.args[0] if first.target is operator.getitem else first
    is_made = isinstance(maker, fx.Node) and maker.op == "call_module" and first is not second
    return is_made and isinstance(modules[str(maker.target)], TwoStreams)  # type: ignore[union-attr]


def _obstacle(root: nn.Module, island: Island, rewriting: _Rewriting) -> str | None:
    return graph.obstacle(root, island.graph, custom_call) or graph.unwritable(root, rewriting.graph)


@dataclass(frozen=True, slots=True)
class _Streams:
    """The nodes of the two streams of a value; `is_view`: the high one is part of another tensor."""

    high: fx.Node
    low: fx.Node
    is_view: bool = False


class _Rewriting:
    """One walk over the graph of one island, in order; `streams` has what is known as two streams."""

    def __init__(self, root: nn.Module, island: Island) -> None:
        self.root, self.path = root, island.path
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.graph = fx.Graph()
        output = self.graph.graph_copy(island.graph, {})
        self.graph.output(output)
        self.layouts: dict[fx.Node, Layout] = {}
        self.streams: dict[fx.Node, _Streams] = {}
        self.joined: dict[fx.Node, fx.Node] = {}
        self.done: list[fx.Node] = []  # nodes that two streams have replaced
        self.norms: dict[str, Ranges] = {}
        self.seams: list[Seam] = []
        self.fired: Counter[str] = Counter()
        self._follow_modes_()

    @property
    def has_gained(self) -> bool:
        """Whether anything was done to the streams between two convs, or a pair handed from one to the next."""
        return any(rule != "octave" for rule in self.fired)

    def low_pass_(self, places: Sequence[LowPass]) -> None:
        """Put low_pass(x) = join(split(x)) in, where the plan wants it."""
        nodes = {node.name: node for node in self.graph.nodes}
        for place in places:
            step, source = nodes.get(place.step), nodes.get(place.operand)
            if step is None or source is None or source not in step.all_input_nodes:
                continue
            other = next(value for value in channelwise.operands(step) if value is not source)
            self._lay_out_until(other)
            if not self.layouts[other].is_octave:  # the conv that made it so is not swapped
                continue
            with self.graph.inserting_before(step):
                made = self.graph.call_function(streams.low_pass, (source, _listed(self.layouts[other].low)))
            step.replace_input_with(source, made)

    def walk(self) -> None:
        self.layouts.clear()
        for node in list(self.graph.nodes):
            self._step(node)
        for node in reversed(self.done):
            self.graph.erase_node(node)

    def _lay_out_until(self, last: fx.Node) -> None:
        for node in self.graph.nodes:
            if node not in self.layouts:
                self.layouts[node] = channelwise.flow(node, self.modules, self.layouts).layout
            if node is last:
                return

    def _step(self, node: fx.Node) -> None:
        flow = channelwise.flow(node, self.modules, self.layouts)
        role = channelwise.role(node, self.modules)
        rule = _RULES.get(role)
        refused = flow.low_pass or not flow.layout.low or (role == "norm" and self._is_taken(node, flow.layout.low))
        self.layouts[node] = flow.layout
        if rule is None or (refused and role != "octave"):
            reason = flow.seam or f"'{node.name}' adds a plain map" if flow.low_pass else flow.seam
            self.layouts[node] = flow.layout.plain
            self._take_whole(node, reason or f"'{node.name}' needs the whole map")
            return
        with self.graph.inserting_before(node):
            made = rule(self, node)
        if made is not None:
            self.streams[node] = made
            self.done.append(node)
            self.fired[role] += 1

    def _is_taken(self, node: fx.Node, low: Ranges) -> bool:
        """Whether a norm is called with other channels low elsewhere."""
        return self.norms.setdefault(str(node.target), low) != low

    def _take_whole(self, node: fx.Node, reason: str) -> None:
        """Leave a step as it is: what it reads is joined before it."""
        for source in node.all_input_nodes:
            if source in self.streams:
                with self.graph.inserting_before(node):
                    whole = self.whole(source, reason)
                node.replace_input_with(source, whole)
                if _is_in_place(node, self.modules):  # whoever reads it after this has to see it
                    del self.streams[source]
                    source.replace_all_uses_with(whole)
                    self.layouts[whole] = self.layouts[source].plain

    def whole(self, node: fx.Node, reason: str) -> fx.Node:
        """Give the plain map of a value."""
        if node not in self.streams:
            return node
        if node not in self.joined:
            pair, layout = self.streams[node], self.layouts[node]
            function = streams.interleave if layout.is_fine else streams.join
            self.joined[node] = self.graph.call_function(function, (pair.high, pair.low, _listed(layout.low)))
            self.layouts[self.joined[node]] = layout.plain
            if layout.is_octave:
                self.seams.append(Seam(self.path, "join", reason))
        return self.joined[node]

    def split(self, node: fx.Node, low: Ranges, reason: str | None) -> _Streams:
        """Give the two streams of a value; split what is plain."""
        layout = self.layouts[node]
        if node in self.streams and layout.low == low:
            pair = self.streams[node]
            self.fired["split(join)"] += 1
            return _Streams(pair.high, self.graph.call_function(streams.pool, (pair.low,))) if layout.is_fine else pair
        whole = self.whole(node, reason or "other channels are low")
        both = self.graph.call_function(streams.split, (whole, _listed(low)))
        if reason is not None:
            self.seams.append(Seam(self.path, "split", reason))
        return self.parts(both, is_view=True)

    def parts(self, both: fx.Node, *, is_view: bool = False) -> _Streams:
        high, low = (self.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        return _Streams(high, low, is_view)

    def twice(self, node: fx.Node, first: dict[fx.Node, fx.Node], second: dict[fx.Node, fx.Node]) -> _Streams:
        """Do a step to each stream."""
        high = self.graph.node_copy(node, lambda n: first.get(n, n))
        return _Streams(high, self.graph.node_copy(node, lambda n: second.get(n, n)))

    def own(self, pair: _Streams, node: fx.Node) -> _Streams:
        """Make sure that a step that works in place changes nobody else's tensor."""
        if not (pair.is_view and _is_in_place(node, self.modules)):
            return pair
        return _Streams(self.graph.call_method("clone", (pair.high,)), self.graph.call_method("clone", (pair.low,)))

    def _follow_modes_(self) -> None:
        """Let functional dropouts read the mode of the module, which tracing has made a constant of."""
        for node in list(self.graph.nodes):
            if node.meta.get(FOLLOWS_MODE):
                with self.graph.inserting_before(node):
                    mode = self.graph.create_node("get_attr", "training")
                node.update_kwarg("training", mode)


def _octave(at: _Rewriting, node: fx.Node) -> _Streams | None:
    """conv(join(h, l)) = join(core(split(join(h, l)))) = join(core(h, l))."""
    block = at.modules[str(node.target)]
    source = channelwise.operand(node)
    assert isinstance(block, OctaveConv)
    assert source is not None
    if not (block.low_in or block.low_out):
        node.replace_input_with(source, at.whole(source, "it reads high channels only"))
        return None
    if block.low_in:
        pair = at.split(source, block.low_in, channelwise.flow(node, at.modules, at.layouts).seam)
        given: tuple[fx.Node, fx.Node | None] = (pair.high, pair.low)
    else:
        given = (at.whole(source, f"'{node.name}' reads high channels only"), None)
    both = at.graph.call_module(str(node.target), (given,))
    if block.low_out:
        return at.parts(both)
    plain = at.graph.call_function(operator.getitem, (both, 0))
    at.layouts[plain] = at.layouts[node]
    node.replace_all_uses_with(plain)
    at.done.append(node)
    at.fired["octave"] += 1
    return None


def _low_pass(at: _Rewriting, node: fx.Node) -> _Streams:
    """low_pass(x) = join(split(x))."""
    return at.split(node.args[0], at.layouts[node].low, None)  # type: ignore[arg-type]


def _elementwise(at: _Rewriting, node: fx.Node) -> _Streams:
    """f(join(h, l)) = join(f(h), f(l)), for f repeats what it does where up repeats a pixel."""
    source = channelwise.operand(node)
    assert source is not None
    pair = at.own(at.streams[source], node)
    return at.twice(node, {source: pair.high}, {source: pair.low})


def _norm(at: _Rewriting, node: fx.Node) -> _Streams:
    """norm(join(h, l)) = join(norm[high] h, norm[low] l)."""
    source = channelwise.operand(node)
    assert source is not None
    pair = at.streams[source]
    return at.parts(at.graph.call_module(str(node.target), ((pair.high, pair.low),)))


def _sum_or_product(at: _Rewriting, node: fx.Node) -> _Streams:
    """join(h, l) + join(h', l') = join(h + h', l + l'), the same for products, and for one number for every channel."""
    highs: dict[fx.Node, fx.Node] = {}
    lows: dict[fx.Node, fx.Node] = {}
    layout = at.layouts[node]
    for i, value in enumerate(channelwise.operands(node)):
        if not isinstance(value, fx.Node):
            continue
        if value in at.streams and at.layouts[value].low == layout.low:
            pair = at.own(at.streams[value], node) if i == 0 else at.streams[value]
            highs[value], lows[value] = pair.high, pair.low
        elif at.layouts[value].channels != 1:
            whole = at.whole(value, f"'{node.name}' reads it")
            rest = streams.others(layout.low, layout.channels or 0)
            highs[value] = at.graph.call_function(streams.take, (whole, _listed(rest), -3))
            lows[value] = at.graph.call_function(streams.take, (whole, _listed(layout.low), -3))
    return at.twice(node, highs, lows)


def _concat(at: _Rewriting, node: fx.Node) -> _Streams:
    """cat(join(h, l), x) = join(cat(h, x), l), with the low channels where they come to lie."""
    highs, lows = [], []
    for part in channelwise.operands(node):
        if part in at.streams and at.layouts[part].is_octave:
            highs.append(at.streams[part].high)
            lows.append(at.streams[part].low)
        else:
            highs.append(at.whole(part, f"'{node.name}' reads it"))
    return _Streams(at.graph.call_function(torch.cat, (highs, 1)), at.graph.call_function(torch.cat, (lows, 1)))


def _spatial(at: _Rewriting, node: fx.Node) -> _Streams:
    """f(join(h, l)) = (f(h), f(up(l))) side by side, and f(up(l)) = l where f takes 2×2 pixels to one."""
    source = channelwise.operand(node)
    assert source is not None
    pair, layout = at.streams[source], at.layouts[source]
    high = at.graph.node_copy(node, lambda n: pair.high if n is source else n)
    if layout.is_fine:
        return _Streams(high, at.graph.node_copy(node, lambda n: pair.low if n is source else n))
    if channelwise.halves(node, at.modules):
        return _Streams(high, at.graph.call_function(streams.crop_to, (pair.low, high)), is_view=True)
    lifted = at.graph.call_function(streams.lift_to, (pair.low, pair.high))
    return _Streams(high, at.graph.node_copy(node, lambda n: lifted if n is source else n))


_RULES: dict[str, Callable[[_Rewriting, fx.Node], _Streams | None]] = {
    "octave": _octave,
    "low_pass": _low_pass,
    "elementwise": _elementwise,
    "norm": _norm,
    "sum": _sum_or_product,
    "product": _sum_or_product,
    "concat": _concat,
    "spatial": _spatial,
}


def _listed(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(limits) for limits in ranges]


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or name.endswith("_") or bool(node.kwargs.get("inplace")) or _has_flag(node)


def _has_flag(node: fx.Node) -> bool:
    """Whether a function such as F.relu(x, True) was told by position to work in place."""
    return any(value is True for value in node.args[1:])
