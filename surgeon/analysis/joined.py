"""How a rewritten graph runs in training on a GPU: norms of two streams, and what follows them, as one step.

    f(norm(h, l) + (h', l'))   is run as   finish(norm, (h, l), (h', l'), f)

on each stream alone (`blocks.pairs.finish`), so that one may have a sum or an activation where the other has none. The
graph that a module holds, that files store and that everything else looks at stays what it is: this is a second
function of the same graph, made when it is first wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.analysis import program as data
from surgeon.blocks import activations
from surgeon.blocks.pairs import PairNorm, finish
from surgeon.one_pass import where

_SUMS = (operator.add, operator.iadd, torch.add)
_PLAIN = (Tensor, nn.Parameter)
Modules = Mapping[str, nn.Module]


def runner(program: Mapping[str, Any]) -> Callable[..., Any]:
    """Make a Python function `forward(self, …)` of a graph: of its steps one by one, or joined where that is faster."""
    one_by_one = data.compiled(program)
    made: list[Callable[..., Any]] = []

    def run(self: nn.Module, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _pays(self, args):
            return one_by_one(self, *args)
        if not made:
            made.append(_joined(self, program) or one_by_one)
        return made[0](self, *args)

    return run


def join_(graph: fx.Graph, modules: Modules) -> int:
    """Put norms of two streams and what follows them into one step each; says how many there are."""
    count = 0
    for node in list(graph.nodes):
        tails = _tails(node, modules)
        if tails is not None and _may_be_one(node, tails):
            _replace_(graph, node, tails)
            count += 1
    return count


def _pays(module: nn.Module, args: tuple[Any, ...]) -> bool:
    if not (module.training and torch.is_grad_enabled() and where.has_triton()):
        return False
    return any(type(x) in _PLAIN and where.is_place(x) for x in args)


def _joined(module: nn.Module, program: Mapping[str, Any]) -> Callable[..., Any] | None:
    graph = data.decode(program)
    if not join_(graph, dict(module.named_modules(remove_duplicate=False))):
        return None
    return data.function_of(graph)


@dataclass(slots=True)
class _Tail:
    """What follows a norm on one stream: the steps, the value that is added, and the activation."""

    part: fx.Node
    steps: list[fx.Node] = field(default_factory=list)
    beside: fx.Node | None = None
    then: fx.Node | str = ""  # a step that calls a module, or a word

    @property
    def last(self) -> fx.Node:
        return self.steps[-1] if self.steps else self.part


def _tails(node: fx.Node, modules: Modules) -> tuple[_Tail, _Tail] | None:
    """Say what follows on both streams, if this is a norm of two streams and something follows on one of them."""
    norm = modules.get(str(node.target)) if node.op == "call_module" else None
    if type(norm) is not PairNorm or norm.then or len(node.args) != 1 or not isinstance(node.args[0], tuple | list):
        return None
    parts = {one.args[1]: one for one in node.users if one.target is operator.getitem}
    if len(node.users) != 2 or parts.keys() != {0, 1}:
        return None
    tails = _tail(parts[0], modules), _tail(parts[1], modules)
    return tails if any(one.steps for one in tails) else None


def _tail(part: fx.Node, modules: Modules) -> _Tail:
    made = _Tail(part)
    step = _only_reader(part)
    if step is not None and _adds_to(step, part):
        made.beside = step.args[1] if step.args[0] is part else step.args[0]  # type: ignore[assignment] # a node
        made.steps.append(step)
    step = _only_reader(made.last)
    if step is not None and (word := _activation(step, made.last, modules)) is not None:
        made.then = step if step.op == "call_module" else word
        made.steps.append(step)
    return made


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds_to(step: fx.Node, part: fx.Node) -> bool:
    """Whether a step adds another value to a stream; one that is changed in place is the stream itself."""
    if step.target not in _SUMS or step.kwargs or len(step.args) != 2:
        return False
    first, second = step.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return False
    return step.target is not operator.iadd or first is part


def _activation(step: fx.Node, of: fx.Node, modules: Modules) -> str | None:
    """Name the activation that a step applies to a value, and does nothing else."""
    flags = [*step.args[1:], *step.kwargs.values()]  # whether it works in place, which nobody can tell here
    if step.args[:1] != (of,) or not all(isinstance(flag, bool) for flag in flags) or step.kwargs.keys() - {"inplace"}:
        return None
    if step.op == "call_module":
        return None if flags else activations.MODULES.get(type(modules[str(step.target)]))
    known = {"call_function": activations.FUNCTIONS, "call_method": activations.METHODS}.get(step.op, {})
    return known.get(step.target)


def _may_be_one(node: fx.Node, tails: tuple[_Tail, _Tail]) -> bool:
    """Whether the norm can be computed where the first of what follows stands, and all of that at once."""
    steps = [step for tail in tails for step in tail.steps]
    first, last, parts = min(steps), max(steps), [tail.part for tail in tails]
    if any(tail.beside is not None and (tail.beside in parts or not tail.beside < first) for tail in tails):
        return False
    if any(one not in steps for one in _between(first, last)):
        return False
    waits_for = [one for one in _between(node, first) if one not in parts]
    if any(one.op == node.op and one.target == node.target for one in waits_for):
        return False  # the same norm, whose running statistics would be updated in another order
    return not waits_for or all(_is_its_own(one, node) for one in node.args[0])  # type: ignore[union-attr]


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found, node = [], first.next
    while first is not last and node is not last:
        found.append(node)
        node = node.next
    return found


def _is_its_own(stream: object, norm: fx.Node) -> bool:
    """Whether nothing but the norm sees what it is given, so that no step changes it."""
    return isinstance(stream, fx.Node) and stream.target is operator.getitem and list(stream.users) == [norm]


def _replace_(graph: fx.Graph, node: fx.Node, tails: tuple[_Tail, _Tail]) -> None:
    steps = [step for tail in tails for step in tail.steps]
    with graph.inserting_before(min(steps)):
        then = [_then(graph, tail) for tail in tails]
        beside = tuple(tail.beside for tail in tails)
        norm = graph.create_node("get_attr", str(node.target))
        made = graph.call_function(finish, (norm, node.args[0], beside, tuple(then)))
        for i, tail in enumerate(tails):
            tail.last.replace_all_uses_with(graph.call_function(operator.getitem, (made, i)))
    for step in sorted(steps, reverse=True):
        graph.erase_node(step)
    for tail in tails:
        graph.erase_node(tail.part)
    graph.erase_node(node)


def _then(graph: fx.Graph, tail: _Tail) -> fx.Node | str:
    return graph.create_node("get_attr", str(tail.then.target)) if isinstance(tail.then, fx.Node) else tail.then
