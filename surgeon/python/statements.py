"""The graph of a call → the lines of a forward.

One step is one line, but for what only asks for shapes, which stands where it is used. A variable is used again where
nothing reads its old value any more:

    out = self.conv1(x)
    out = self.bn1(out)
    out += x
    return self.relu(out)
"""

from __future__ import annotations

import operator
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from surgeon.python import literals
from surgeon.python.layout import WIDTH, Bracket, Code, call, lines
from surgeon.python.literals import NoTextError
from surgeon.python.nested import Call
from surgeon.python.steps import (
    CHANGING,
    HIGHEST,
    INFIX,
    METHODS,
    PREFIX,
    RANKS,
    SAYS_LITTLE,
    all_of,
    annotation,
    args_of,
    function_text,
    inputs_of,
    main_inputs,
    mapped_values,
    name_of,
    needed,
    pair_names,
    rank_of,
    read_directly,
    skipped,
    telling,
    unpacked_parts,
    value_of_step,
)


class Forward:
    """The text of one call: its parameters, what it returns, and its lines."""

    def __init__(self, call: Call, reach: Callable[[str], str]) -> None:
        self.call, self.reach = call, reach
        self.nodes = needed(call.graph)
        self.output = next(reversed(call.graph.nodes))
        self.names: dict[fx.Node, str] = {}  # of variables
        self.taken = set(literals.IN_USE)
        self.parameters = [self._parameter(n, name) for n, name in zip(inputs_of(call.graph), call.names, strict=True)]
        self.taken |= literals.RESERVED
        self.unpacked = {part for node in self.nodes for part in unpacked_parts(node) or ()}
        self.last_use = self._last_uses()
        self.returns = annotation(mapped_values(self.output.args[0]))
        self.lines = self._lines()

    def _parameter(self, node: fx.Node, name: str) -> tuple[str, str]:
        self.names[node] = made = literals.as_name(name, "x", self.taken)
        self.taken.add(made)
        return made, annotation(node.meta["value"])

    def _last_uses(self) -> dict[fx.Node, int]:
        """Say at which statement the value of each step is read for the last time."""
        last: dict[fx.Node, int] = {}

        def note(node: fx.Node, at: int) -> None:
            node = skipped(node)
            if node not in self.names and node not in self.unpacked and not self._is_statement(node):
                for one in node.all_input_nodes:
                    note(one, at)
            else:
                last[node] = at

        for at, node in enumerate([*self.nodes, self.output]):
            if node is self.output or self._is_statement(node):
                for one in node.all_input_nodes:
                    note(one, at)
        return last

    def _is_statement(self, node: fx.Node) -> bool:
        """Whether a step has a line of its own."""
        if node.op in ("placeholder", "get_attr", "output"):
            return False
        if node.target is operator.setitem:
            return True
        if node.target is getattr:
            return False
        if node.target is operator.getitem and not isinstance(value_of_step(args_of(node)[0]), Tensor):
            return False  # a part of what a step gives, which that step may have unpacked
        return (
            isinstance(node.meta.get("value"), Tensor)
            or len(node.users) > 1
            or node.op == "call_module"
            or (isinstance(node.meta.get("value"), tuple | list | dict) and node.target is not OrderedDict)
        )

    def _lines(self) -> list[str]:
        made: list[str] = []
        for at, node in enumerate(self.nodes):
            if not self._is_statement(node):
                continue
            if self._is_returned(node, at):
                return [*made, *lines("return ", self._code(node), indent=8)]
            made += self._statement(node, at)
        given = self._argument(self.output.args[0])
        if isinstance(given, Bracket) and given.head == "(" and len(given.items) > 1:
            bare = f"        return {str(given)[1:-1]}"
            if len(bare) <= WIDTH:
                return [*made, bare]
        return [*made, *lines("return ", given, indent=8)]

    def _is_returned(self, node: fx.Node, at: int) -> bool:
        """Whether it is the last step, and its result is what the forward gives."""
        is_last = not any(self._is_statement(n) for n in self.nodes[at + 1 :])
        is_all = isinstance(self.output.args[0], fx.Node) and skipped(self.output.args[0]) is node
        return is_last and is_all and name_of(node.target) not in CHANGING and node.target is not operator.setitem

    def _statement(self, node: fx.Node, at: int) -> list[str]:
        if node.target is operator.setitem:
            place = self._subscript(node.args[0], node.args[1])
            return lines(f"{place} = ", self._argument(node.args[2]), indent=8)
        if (sign := CHANGING.get(name_of(node.target))) and node.op == "call_function":
            changed = skipped(args_of(node)[0])
            if changed in self.names:
                self.names[node] = self.names[changed]
                return lines(f"{self.names[node]} {sign} ", self._argument(node.args[1]), indent=8)
        code = self._code(node)
        if not node.users:
            return lines("", code, indent=8)
        if (parts := unpacked_parts(node)) is not None:
            for part, hint in zip(parts, pair_names(node.meta["value"]), strict=True):
                self.names[part] = self._new_name(hint or self._hint(part))
            return lines(f"{', '.join(self.names[part] for part in parts)} = ", code, indent=8)
        self.names[node] = self._variable(node, at)
        return lines(f"{self.names[node]} = ", code, indent=8)

    def _new_name(self, hint: str) -> str:
        made = literals.as_name(hint, "out", self.taken)
        self.taken.add(made)
        return made

    def _variable(self, node: fx.Node, at: int) -> str:
        """Choose the variable of a step: one whose value nothing reads any more, or a new one."""
        for source in main_inputs(node):
            if source in self.names and isinstance(source.meta.get("value"), Tensor):
                name = self.names[source]
                others = [n for n, one in self.names.items() if one == name]
                if all(self.last_use.get(n, -1) <= at for n in others) and isinstance(node.meta["value"], Tensor):
                    return name
        return self._new_name(self._hint(node))

    def _hint(self, node: fx.Node) -> str:
        """Say what a new variable is called: `out` if it leads to the result, else as the last module on its way."""
        at, named = node, [node]
        while len(users := list(at.users)) == 1 and users[0].op != "output" and at in main_inputs(users[0])[:1]:
            at = users[0]
            named.append(at)
        if self.output in at.users and self.output.args[0] is at:
            return "out"
        modules = [str(n.target).rpartition(".")[2] for n in named if n.op == "call_module"]
        words = [re.sub(r"_?\d+$", "", one) for one in reversed(modules) if not SAYS_LITTLE.match(one)]
        own = name_of(node.target) if node.op != "call_module" else ""
        found = next((one for one in words if literals.is_name(one)), own.strip("_"))
        return {"getitem": "part", "": "y"}.get(found, found)

    def _code(self, node: fx.Node) -> Code:
        """Write what a step computes."""
        if node.op == "call_module":
            return call(self.reach(str(node.target)), *self._arguments(node.args, node.kwargs))
        if node.op == "call_method":
            if not literals.is_name(str(node.target)):
                raise NoTextError(f"it calls the method {node.target!r}")
            return call(f"{self._operand(node.args[0])}.{node.target}", *self._arguments(node.args[1:], node.kwargs))
        name = name_of(node.target)
        if node.target is getattr:
            return f"{self._operand(node.args[0])}.{node.args[1]}"
        if node.target is operator.getitem:
            return self._subscript(node.args[0], node.args[1])
        if getattr(operator, name, None) is node.target and name in INFIX:
            return self._infix(INFIX[name], *node.args)
        if getattr(operator, name, None) is node.target and name in PREFIX:
            return f"{PREFIX[name]}{self._operand(node.args[0], HIGHEST)}"
        if getattr(operator, name, None) is node.target and name in CHANGING:
            return call(f"{self._operand(node.args[0])}.{METHODS[name]}", [self._argument(node.args[1])])
        return call(function_text(node.target), *self._arguments(node.args, telling(node.target, node.kwargs)))

    def _infix(self, sign: str, left: Any, right: Any) -> str:
        rank = RANKS[sign]
        one, other = self._operand(left, rank + (sign == "**")), self._operand(right, rank + 1)
        tight = sign == "**" and all(re.fullmatch(r"-?[\w.]+", side) for side in (one, other))
        return f"{one}{sign}{other}" if tight else f"{one} {sign} {other}"

    def _operand(self, value: Any, rank: int = 9) -> str:
        """Write what stands beside an operator of this rank, in parentheses if it needs them."""
        code = str(self._argument(value))
        if isinstance(value, fx.Node):
            found = skipped(value)
            is_inside = found not in self.names and found.op == "call_function"
            own = rank_of(found) if is_inside else HIGHEST
        else:
            own = 4 if isinstance(value, float | int) and not isinstance(value, bool) and value < 0 else HIGHEST
        return f"({code})" if own < rank else code

    def _subscript(self, whole: Any, place: Any) -> str:
        whole, place = read_directly(whole, place)
        if isinstance(place, tuple) and place:
            inside = ", ".join(map(self._place, place)) + ("," if len(place) == 1 else "")
        else:
            inside = self._place(place)
        return f"{self._operand(whole)}[{inside}]"

    def _place(self, place: Any) -> str:
        if not isinstance(place, slice):
            return str(self._argument(place))
        start, stop = ("" if part is None else str(self._argument(part)) for part in (place.start, place.stop))
        step = "" if place.step is None else str(self._argument(place.step))
        is_plain = all(re.fullmatch(r"-?\w*", part) for part in (start, stop, step))
        if is_plain:
            return f"{start}:{stop}" + (f":{step}" if step else "")
        return (f"{start} : {stop}" + (f" : {step}" if step else "")).strip()

    def _arguments(self, args: Any, kwargs: Any) -> tuple[list[Code], list[tuple[str, Code]]]:
        if bad := [name for name in kwargs if not literals.is_name(name)]:
            raise NoTextError(f"it gives an argument called {bad[0]!r}")
        return [self._argument(one) for one in args], [(name, self._argument(one)) for name, one in kwargs.items()]

    def _argument(self, value: Any) -> Code:
        """Write a value that may hold results of other steps."""
        if isinstance(value, fx.Node):
            node = skipped(value)
            if node in self.names:
                return self.names[node]
            return self.reach(str(node.target)) if node.op == "get_attr" else self._code(node)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return call(type(value).__name__, [self._argument(part) for part in value])
        if isinstance(value, tuple | list):
            if (source := all_of(value)) is not None:
                return self._argument(source)
            head, close = "()" if isinstance(value, tuple) else "[]"
            return Bracket(head, tuple(("", self._argument(part)) for part in value), close)
        if type(value) is OrderedDict:
            return call("OrderedDict", [self._argument(list(value.items()))])
        if isinstance(value, dict):
            items = tuple((f"{literals.text(key)}: ", self._argument(part)) for key, part in value.items())
            return Bracket("{", items, "}")
        if isinstance(value, slice):
            return call("slice", [self._argument(part) for part in (value.start, value.stop, value.step)])
        return literals.text(value)
