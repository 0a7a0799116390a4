"""Let deployed octave convs do what follows them in a graph.

    f(conv(h, l) + (h', l'))   becomes   conv((h, l), (h', l'), f)

where both streams are added to, and go through the same activation, and nothing else reads what is in between. A conv
that reads both streams of another gets all that the other gives: with it the map that is read at half the resolution
(`blocks/octave_step`). Every number is what it was, up to the order of sums.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F

from surgeon.analysis import rewritten
from surgeon.blocks import activations
from surgeon.blocks.octave_step import OctaveStep
from surgeon.blocks.pairs import PairRest
from surgeon.conv import streams
from surgeon.models.copies import shadow
from surgeon.octave.layout import Step

_SUMS = (operator.add, operator.iadd, torch.add, streams.add_into)


def absorb_(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Move sums and activations behind octave convs into their calls, and hand on all that a conv gives."""
    for node in list(graph.nodes):
        if _conv(node, modules) is not None and len(node.args) == 1:
            _with_activation(graph, _with_sum(graph, node, modules), modules)
    for node in graph.nodes:
        if _conv(node, modules) is not None:
            node.args = tuple(_source(one, modules) or one for one in node.args)
    for node in list(graph.nodes):
        maker = node.args[0] if node.target is operator.getitem else None
        if isinstance(maker, fx.Node) and not node.users and _conv(maker, modules) is not None:
            graph.erase_node(node)


def _conv(node: fx.Node, modules: Mapping[str, nn.Module]) -> OctaveStep | None:
    """Give the octave conv that a step calls with two streams."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, OctaveStep):
        return None
    given = node.args[0]
    is_pair = isinstance(given, tuple | list) or (isinstance(given, fx.Node) and _conv(given, modules) is not None)
    return module if is_pair else None


def _parts(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Give the streams that are taken out of what a conv gives: one step each, high first, and nothing else."""
    taken = list(node.users)
    if any(one.target is not operator.getitem for one in taken):
        return None
    parts = tuple(sorted(taken, key=_place))
    return parts if [_place(one) for one in parts] in ([0], [0, 1]) else None


def _place(part: fx.Node) -> int:
    place = part.args[1]
    assert isinstance(place, int)
    return place


def _with_sum(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Add a pair while a conv is computed; gives the new call, or the old one if there is no such sum."""
    parts = _parts(node)
    if parts is None:
        return node
    sums, beside = [], []
    for part in parts:
        step = next(iter(part.users), None)
        if step is None or len(part.users) > 1 or step.target not in _SUMS or step.kwargs or len(step.args) != 2:
            return node
        other = step.args[1] if step.args[0] is part else step.args[0]
        if not isinstance(other, fx.Node) or other is part:
            return node
        sums.append(step)
        beside.append(other)
    pair = tuple(beside) if len(beside) == 2 else (beside[0], None)
    first = min(sums)
    if not _are_streams(pair, modules) or any(one > first for one in beside) or not _may_wait(node, first, modules):
        return node
    with graph.inserting_before(first):
        made = graph.call_module(str(node.target), (node.args[0], pair))
        new = [graph.call_function(operator.getitem, (made, i)) for i in range(len(parts))]
    for old, one in zip(sums, new, strict=True):
        old.replace_all_uses_with(one)
        graph.erase_node(old)
    for part in parts:
        graph.erase_node(part)
    graph.erase_node(node)
    return made


def _with_activation(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> None:
    """Let a conv end with the activation that both of its streams go through."""
    parts = _parts(node)
    if parts is None:
        return
    behind = [next(iter(part.users)) if len(part.users) == 1 else None for part in parts]
    if None in behind:
        return
    words = {_activation(one, part, modules) for one, part in zip(behind, parts, strict=True) if one is not None}
    if words == {None} and len(set(behind)) == 1:
        _with_rest(graph, node, behind[0], parts, modules)
        return
    word = words.pop() if len(words) == 1 else None
    if word is None:
        return
    paths = {str(one.target) for one in behind if one is not None and one.op == "call_module"}
    _end_with(node, word, paths.pop() if len(paths) == 1 else "")
    for one, part in zip(behind, parts, strict=True):
        assert one is not None
        one.replace_all_uses_with(part)
        graph.erase_node(one)


def _with_rest(
    graph: fx.Graph,
    node: fx.Node,
    rest: fx.Node | None,
    parts: tuple[fx.Node, ...],
    modules: Mapping[str, nn.Module],
) -> None:
    """Do the same with what a norm of two streams has left, if that is an activation."""
    module = modules.get(str(rest.target)) if rest is not None and rest.op == "call_module" else None
    if (
        rest is None
        or type(module) is not PairRest
        or tuple(rest.args) != (parts,)
        or Step(rest, modules).is_customised
    ):
        return
    inner = [module.get_submodule(name) for name in module.then]
    inner = [one for one in inner if type(one) is not nn.Identity]
    users = list(rest.users)
    if len(inner) > 1 or any(type(one) not in activations.MODULES for one in inner) or _parts(rest) is None:
        return
    if inner:
        _end_with(node, activations.MODULES[type(inner[0])], str(rest.target))
    for one in users:
        one.replace_all_uses_with(parts[_place(one)])
        graph.erase_node(one)
    graph.erase_node(rest)


def _end_with(node: fx.Node, word: str, instead_of: str) -> None:
    beside = node.args[1] if len(node.args) > 1 else None
    node.args = (node.args[0], beside, word, *[instead_of] * bool(instead_of))


def _activation(node: fx.Node, of: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Say which activation a step applies, if it is one of those that a conv can end with."""
    step = Step(node, modules)
    if step.operand is not of or step.others or step.is_customised:
        return None
    if step.module is not None:
        return activations.MODULES.get(type(step.module))
    known = {"call_function": activations.FUNCTIONS, "call_method": activations.METHODS}.get(node.op, {})
    return known.get(node.target)


def _source(pair: object, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Give the octave conv both of whose streams a pair is, in their order; None if it is another pair."""
    if not isinstance(pair, tuple | list) or not isinstance(pair[0], fx.Node):
        return None
    maker = pair[0].args[0] if pair[0].target is operator.getitem else None
    if not isinstance(maker, fx.Node) or _conv(maker, modules) is None or pair[0].args[1] != 0:
        return None
    if pair[1] is None:
        return maker if len([one for one in maker.users if one.args[1:] == (1,)]) == 0 else None
    is_low = isinstance(pair[1], fx.Node) and pair[1].target is operator.getitem and pair[1].args == (maker, 1)
    return maker if is_low else None


def _are_streams(pair: tuple[fx.Node | None, ...], modules: Mapping[str, nn.Module]) -> bool:
    """Whether two values are the streams of one map: of an octave conv, or of a map that has just been split."""
    high, low = pair
    maker = high.args[0] if high is not None and high.target is operator.getitem else None
    if isinstance(maker, fx.Node) and maker.target is streams.split and low is not None:
        return (high.args[1], low.target, low.args) == (0, operator.getitem, (maker, 1))  # type: ignore[union-attr]
    return _source(pair, modules) is not None


def _may_wait(first: fx.Node, last: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a conv may be computed later: steps in between change nothing but what other convs have just made."""
    node = first.next
    while node is not last:
        if node.target is streams.add_into or Step(node, modules).is_in_place:
            changed = node.args[0] if node.args else None
            maker = changed.args[0] if isinstance(changed, fx.Node) and changed.target is operator.getitem else None
            if not isinstance(maker, fx.Node) or _conv(maker, modules) is None or changed in first.all_input_nodes:
                return False
        node = node.next
    return True


def undone(model: nn.Module) -> nn.Module:
    """Give a copy that shares its tensors, in which octave convs do nothing in their calls but convolve.

    Everything that they did besides is a step of its own, so what every one of them gives can be looked at. A model in
    which there is nothing to undo is given itself.
    """
    made: nn.Module | None = None
    for path, module in model.named_modules():
        if (graph := rewritten.graph_of(module)) is None:
            continue
        inner = dict(module.named_modules(remove_duplicate=False))
        nodes = [node for node in graph.nodes if _conv(node, inner) is not None]
        if any(len(node.args) > 1 for node in nodes):
            for node in nodes:
                _undo_(graph, node, inner)
            made = made or shadow(model)
            rewritten.rewrite_(made.get_submodule(path), graph)
    return made or model


def _undo_(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> None:
    conv = modules[str(node.target)]
    assert isinstance(conv, OctaveStep)
    told: list[object] = [*node.args[1:], *(None, "", "")[len(node.args) - 1 :]]
    beside, then, instead_of = told
    with graph.inserting_before(node):
        both = graph.call_module(str(node.target), (node.args[0],))
        parts = [graph.call_function(operator.getitem, (both, i)) for i in range(2 if conv.low_out else 1)]
        if isinstance(beside, fx.Node):
            beside = [graph.call_function(operator.getitem, (beside, i)) for i in range(len(parts))]
        if isinstance(beside, Sequence):
            parts = [graph.call_function(operator.add, pair) for pair in zip(parts, beside, strict=False)]
        if isinstance(modules.get(str(instead_of)), PairRest):
            pair = graph.call_module(str(instead_of), (tuple(parts),))
            parts = [graph.call_function(operator.getitem, (pair, i)) for i in range(len(parts))]
        elif instead_of:
            parts = [graph.call_module(str(instead_of), (part,)) for part in parts]
        elif then:
            parts = [graph.call_function(_named(str(then)), (part,)) for part in parts]
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(parts[_place(user)])
            graph.erase_node(user)
        else:
            made = tuple(parts) if len(parts) == 2 else (parts[0], None)
            user.args = tuple(made if one is node else one for one in user.args)
    graph.erase_node(node)


def _named(word: str) -> Callable[..., torch.Tensor]:
    known: dict[str, Callable[..., torch.Tensor]]
    known = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    return known[word]
