"""Remove octave seams from a graph by exact rewriting.

A seam is where an octave pair is joined into one map only to be split again. Every octave conv begins as
join ∘ core ∘ split; here joins are moved down through the graph, step by step, until they meet a split, which undoes
them:

    split(join(h, l)) = (h, l)

The files of `rules/` say what each kind of step does to two streams: one class each, with its equation. In eval mode
they are exact bit by bit: every number is computed as before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from surgeon.analysis import rewritten
from surgeon.analysis.islands import Island
from surgeon.analysis.obstacles import custom_call
from surgeon.blocks.pairs import make_pair_norm_
from surgeon.blocks.two_streams import TwoStreamBlock, TwoStreams
from surgeon.conv import streams
from surgeon.octave.absorb import absorb_
from surgeon.octave.rules import rule_of
from surgeon.octave.stream_graph import Seam, StreamGraph, StreamNodes, listed


@dataclass(frozen=True, slots=True)
class LowPass:
    """An operand of a step that is low-passed there: a plain map that is added to an octave map.

    `said` is both in the user's words.
    """

    island: str
    step: str
    operand: str
    said: str = ""


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
    model: nn.Module,
    islands: Sequence[Island],
    low_passes: Sequence[LowPass] = (),
    *,
    left: Mapping[str, str] | None = None,
    only_low_pass: bool = False,
) -> Outcome:
    """Rewrite those of a model's islands that hold octave convs.

    `low_passes` come from the plan, and so do the islands that are `left` as they are, with reasons. With
    `only_low_pass` nothing else is done, and every conv still splits and joins.
    """
    outcome = Outcome()
    for island in islands:
        root = model.get_submodule(island.path)
        blocks = [m for m in root.modules() if isinstance(m, TwoStreamBlock) and not m.keeps_seams]
        if not blocks:
            continue
        own = [one for one in low_passes if one.island == island.path]
        made = StreamGraph(root, island)
        _low_pass_(made, own)
        if not only_low_pass:
            _walk_(made)
        if not (own or made.has_gained):
            continue
        if why := (left or {}).get(island.path) or _obstacle(root, island, made):
            outcome.seams.append(Seam(island.path, "local", why))
            continue
        outcome.undos += [make_pair_norm_(root.get_submodule(path), low) for path, low in made.norms.items()]
        outcome.undos.append(rewritten.rewrite_(root, made.graph))
        outcome.seams += made.seams
        outcome.fired += made.fired
        outcome.rewritten += (island.path,)
    return outcome


def deploy_(model: nn.Module, *, absorbs: bool = True) -> None:
    """Tidy the graphs of a model whose blocks are deployed: no Identities, and sums in place where possible.

    With `absorbs`, octave convs do what follows them; before the third rules of folding they did not.
    """
    for module in model.modules():
        if (known := rewritten.graph_of(module)) is not None:
            modules = dict(module.named_modules(remove_duplicate=False))
            _drop_identities_(known, modules)
            if absorbs:
                absorb_(known, modules)
            for node in known.nodes:
                if _adds_to_its_own(node, modules):
                    node.target = streams.add_into
            rewritten.rewrite_(module, known)


def _drop_identities_(new: fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(new.nodes):
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.Identity:
            continue
        given = node.args[0]
        if isinstance(given, fx.Node):
            node.replace_all_uses_with(given)
        else:  # a pair; each of its readers takes one of the two
            for part in list(node.users):
                part.replace_all_uses_with(given[part.args[1]])
                new.erase_node(part)
        new.erase_node(node)


def _adds_to_its_own(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a step adds to a tensor that a conv has just made and that nothing else reads."""
    if node.target not in (operator.add, torch.add) or node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or len(first.users) > 1:
        return False
    maker = first.args[0] if first.target is operator.getitem else first
    is_made = isinstance(maker, fx.Node) and maker.op == "call_module" and first is not second
    return is_made and isinstance(modules[str(maker.target)], TwoStreams)  # type: ignore[union-attr]


def _obstacle(root: nn.Module, island: Island, made: StreamGraph) -> str | None:
    return rewritten.obstacle(root, island.graph, custom_call) or rewritten.unwritable(root, made.graph)


def _low_pass_(graph: StreamGraph, places: Sequence[LowPass]) -> None:
    """Insert low_pass(x) = join(split(x)) where the plan wants it."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for place in places:
        step, source = nodes.get(place.step), nodes.get(place.operand)
        if step is None or source is None or source not in step.all_input_nodes:
            continue
        other = next((value for value in graph.step(step).operands if value is not source), None)
        if not isinstance(other, fx.Node):
            continue
        _lay_out_until_(graph, other)
        if not graph.layouts[other].is_octave:  # the conv that would make it octave is not swapped
            continue
        with graph.graph.inserting_before(step):
            made = graph.call(streams.low_pass, source, listed(graph.layouts[other].low))
        step.replace_input_with(source, made)


def _lay_out_until_(graph: StreamGraph, last: fx.Node) -> None:
    for node in graph.graph.nodes:
        if node not in graph.layouts:
            step = graph.step(node)
            graph.layouts[node] = rule_of(step).flow(step, graph.layouts).layout
        if node is last:
            return


def _walk_(graph: StreamGraph) -> None:
    """Lead the streams through every step, in order."""
    graph.layouts.clear()
    for node in list(graph.graph.nodes):
        _lead_through_(graph, node)
    graph.erase_replaced_()


def _lead_through_(graph: StreamGraph, node: fx.Node) -> None:
    step = graph.step(node)
    rule = rule_of(step)
    flow = rule.flow(step, graph.layouts)
    graph.layouts[node] = flow.layout
    if (why := rule.obstacle(step, flow, graph)) is not None:
        graph.layouts[node] = flow.layout.plain
        graph.take_whole_(step, why)
        return
    with graph.graph.inserting_before(node):
        made = rule.rewrite(step, graph)
    if made is not None:
        graph.replace_(node, made)
        if step.is_in_place and step.operand is not None and isinstance(made, StreamNodes):
            graph.renew_(step.operand, made)
        graph.fired[rule.name] += 1
        graph.has_gained |= rule.carries
