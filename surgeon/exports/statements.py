"""The graph of a call → the lines of a forward.

One step is one line, but for what only asks for shapes, which stands where it is used. A variable is used again where
nothing reads its old value any more:

    out = self.conv1(x)
    out = self.bn1(out)
    out += x
    return self.relu(out)
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgeon.exports import literals
from surgeon.exports.layers import same
from surgeon.exports.layout import WIDTH, Bracket, Code, call, lines
from surgeon.exports.literals import NoTextError
from surgeon.exports.nested import Call

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "matmul": "@", "and_": "&",
    "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "pow": "**",
}  # fmt: skip
_RANKS = {
    "==": 0, "!=": 0, "<": 0, "<=": 0, ">": 0, ">=": 0, "|": 0, "^": 0, "&": 0, "<<": 0, ">>": 0, "+": 2, "-": 2,
    "*": 3, "/": 3, "//": 3, "%": 3, "@": 3, "**": 5,
}  # fmt: skip
_HIGHEST = 9
_SAYS_LITTLE = re.compile(r"\d+$|relu|act|bn|norm|drop", re.IGNORECASE)  # names of modules, for a variable
_PREFIX = {"neg": "-", "invert": "~", "pos": "+"}
_CHANGING = {"iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/="}
_PLAIN = {operator.abs: "abs", math.ceil: "math.ceil", math.floor: "math.floor", OrderedDict: "OrderedDict"}
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_HOMES = (
    ("torch", torch), ("F", F), ("torch.linalg", torch.linalg), ("torch.special", torch.special),
    ("torch.fft", torch.fft),
)  # fmt: skip


class Forward:
    """The text of one call: its parameters, what it returns, and its lines."""

    def __init__(self, call: Call, reach: Callable[[str], str]) -> None:
        self.call, self.reach = call, reach
        self.nodes = _needed(call.graph)
        self.output = next(reversed(call.graph.nodes))
        self.names: dict[fx.Node, str] = {}  # of variables
        self.taken = set(literals.IN_USE)
        self.parameters = [self._parameter(n, name) for n, name in zip(_inputs(call.graph), call.names, strict=True)]
        self.taken |= literals.RESERVED
        self.unpacked = {part for node in self.nodes for part in _parts(node) or ()}
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
            node = _skipped(node)
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
        if node.target is operator.getitem and not isinstance(_value(_args(node)[0]), Tensor):
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
        is_all = isinstance(self.output.args[0], fx.Node) and _skipped(self.output.args[0]) is node
        return is_last and is_all and _name_of(node.target) not in _CHANGING and node.target is not operator.setitem

    def _statement(self, node: fx.Node, at: int) -> list[str]:
        if node.target is operator.setitem:
            place = self._subscript(node.args[0], node.args[1])
            return lines(f"{place} = ", self._argument(node.args[2]), indent=8)
        if (sign := _CHANGING.get(_name_of(node.target))) and node.op == "call_function":
            changed = _skipped(_args(node)[0])
            if changed in self.names:
                self.names[node] = self.names[changed]
                return lines(f"{self.names[node]} {sign} ", self._argument(node.args[1]), indent=8)
        code = self._code(node)
        if not node.users:
            return lines("", code, indent=8)
        if (parts := _parts(node)) is not None:
            for part, hint in zip(parts, _pair_names(node.meta["value"]), strict=True):
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
        for source in _main_inputs(node):
            if source in self.names and isinstance(source.meta.get("value"), Tensor):
                name = self.names[source]
                others = [n for n, one in self.names.items() if one == name]
                if all(self.last_use.get(n, -1) <= at for n in others) and isinstance(node.meta["value"], Tensor):
                    return name
        return self._new_name(self._hint(node))

    def _hint(self, node: fx.Node) -> str:
        """Say what a new variable is called: `out` if it leads to the result, else as the last module on its way."""
        at, named = node, [node]
        while len(users := list(at.users)) == 1 and users[0].op != "output" and at in _main_inputs(users[0])[:1]:
            at = users[0]
            named.append(at)
        if self.output in at.users and self.output.args[0] is at:
            return "out"
        modules = [str(n.target).rpartition(".")[2] for n in named if n.op == "call_module"]
        words = [re.sub(r"_?\d+$", "", one) for one in reversed(modules) if not _SAYS_LITTLE.match(one)]
        own = _name_of(node.target) if node.op != "call_module" else ""
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
        name = _name_of(node.target)
        if node.target is getattr:
            return f"{self._operand(node.args[0])}.{node.args[1]}"
        if node.target is operator.getitem:
            return self._subscript(node.args[0], node.args[1])
        if getattr(operator, name, None) is node.target and name in _INFIX:
            return self._infix(_INFIX[name], *node.args)
        if getattr(operator, name, None) is node.target and name in _PREFIX:
            return f"{_PREFIX[name]}{self._operand(node.args[0], _HIGHEST)}"
        if getattr(operator, name, None) is node.target and name in _CHANGING:
            return call(f"{self._operand(node.args[0])}.{_METHODS[name]}", [self._argument(node.args[1])])
        return call(function_text(node.target), *self._arguments(node.args, _telling(node.target, node.kwargs)))

    def _infix(self, sign: str, left: Any, right: Any) -> str:
        rank = _RANKS[sign]
        one, other = self._operand(left, rank + (sign == "**")), self._operand(right, rank + 1)
        tight = sign == "**" and all(re.fullmatch(r"-?[\w.]+", side) for side in (one, other))
        return f"{one}{sign}{other}" if tight else f"{one} {sign} {other}"

    def _operand(self, value: Any, rank: int = 9) -> str:
        """Write what stands beside an operator of this rank, in parentheses if it needs them."""
        code = str(self._argument(value))
        if isinstance(value, fx.Node):
            found = _skipped(value)
            is_inside = found not in self.names and found.op == "call_function"
            own = _rank_of(found) if is_inside else _HIGHEST
        else:
            own = 4 if isinstance(value, float | int) and not isinstance(value, bool) and value < 0 else _HIGHEST
        return f"({code})" if own < rank else code

    def _subscript(self, whole: Any, place: Any) -> str:
        whole, place = _direct(whole, place)
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
            node = _skipped(value)
            if node in self.names:
                return self.names[node]
            return self.reach(str(node.target)) if node.op == "get_attr" else self._code(node)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return call(type(value).__name__, [self._argument(part) for part in value])
        if isinstance(value, tuple | list):
            if (source := _whole(value)) is not None:
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


def _rank_of(node: fx.Node) -> int:
    name = _name_of(node.target)
    if getattr(operator, name, None) is not node.target:
        return _HIGHEST
    return _RANKS[_INFIX[name]] if name in _INFIX else 4 if name in _PREFIX else _HIGHEST


_METHODS = {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """Give the steps that read each part of what a module gives once, if nothing else reads it."""
    value, users = _value(node), list(node.users)
    if node.op != "call_module" or type(value) not in (tuple, list) or len(users) < 2 or len(users) != len(value):
        return None
    if any(
        one.target is not operator.getitem or not isinstance(part, Tensor)
        for one, part in zip(users, value, strict=True)
    ):
        return None
    by_place = {one.args[1]: one for one in users}
    return [by_place[i] for i in range(len(value))] if set(by_place) == set(range(len(value))) else None


def _pair_names(value: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Name what is unpacked: two maps of which the second has half the resolution are two streams."""
    if len(value) == 2 and all(one.dim() == 4 for one in value):
        high, low = (one.shape[-2:] for one in value)
        if tuple(low) == tuple(-(-side // 2) for side in high):
            return "high", "low"
    return ("",) * len(value)


def _direct(whole: Any, place: Any) -> tuple[Any, Any]:
    """Read shape[-2:][0] as shape[-2]."""
    if type(place) is int and place >= 0 and isinstance(whole, fx.Node) and whole.target is operator.getitem:
        cut = whole.args[1]
        is_of_sizes = isinstance(whole.args[0], fx.Node) and isinstance(whole.args[0].meta.get("value"), torch.Size)
        if is_of_sizes and isinstance(cut, slice) and cut.step is None and cut.stop is None and type(cut.start) is int:
            if cut.start + place < 0 or cut.start >= 0:
                return whole.args[0], cut.start + place
    return whole, place


def _telling(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the named arguments that say more than the defaults do."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # it is not written in Python
        return kwargs
    return {
        name: value
        for name, value in kwargs.items()
        if name not in known or isinstance(value, fx.Node) or not same(value, known[name].default)
    }


def _whole(value: tuple[Any, ...] | list[Any]) -> fx.Node | None:
    """Give the step whose result is just these values, each of them in its place."""
    nodes = [_skipped(one) for one in value if isinstance(one, fx.Node)]
    if not nodes or len(nodes) < len(value) or any(one.target is not operator.getitem for one in nodes):
        return None
    source = nodes[0].args[0]
    is_all = isinstance(source, fx.Node) and [one.args for one in nodes] == [(source, i) for i in range(len(nodes))]
    if not is_all or not isinstance(source, fx.Node):
        return None
    known = source.meta["value"]
    return source if type(known) is type(value) and len(known) == len(value) else None


def function_text(function: Any) -> str:
    """Name a function of torch.

    Raises:
        NoTextError: it is none that torch offers under a public name.
    """
    if function in _PLAIN:
        return _PLAIN[function]
    name = _name_of(function)
    for home, module in _HOMES:
        names = [name, *([] if home == "torch" else [n for n in vars(module) if vars(module)[n] is function])]
        for one in names:
            if literals.is_name(one) and not one.startswith("_") and getattr(module, one, None) is function:
                return f"{home}.{one}"
    raise NoTextError(f"it calls {getattr(function, '__module__', '')}.{name}, which is not a function of torch")


def annotation(value: Any) -> str:
    """Write the type of what a forward takes or gives.

    >>> annotation((torch.zeros(1), [torch.zeros(1)])), annotation({"a": torch.zeros(1)}), annotation(3)
    ('tuple[Tensor, list[Tensor]]', 'dict[str, Tensor]', 'Any')
    """
    if isinstance(value, Tensor):
        return "Tensor"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__ if type(value).__module__ != "torch.return_types" else "Any"
    if isinstance(value, torch.Size):
        return "Any"
    if isinstance(value, tuple) and value:
        return f"tuple[{', '.join(map(annotation, value))}]"
    if isinstance(value, list) and value:
        kinds = sorted({annotation(one) for one in value})
        return f"list[{kinds[0] if len(kinds) == 1 else 'Any'}]"
    if isinstance(value, dict) and value:
        kinds = sorted({annotation(one) for one in value.values()})
        head = "OrderedDict" if type(value) is OrderedDict else "dict"
        keys = "str" if all(type(key) is str for key in value) else "Any"
        return f"{head}[{keys}, {kinds[0] if len(kinds) == 1 else 'Any'}]"
    return "None" if value is None else "Any"


def mapped_values(value: Any) -> Any:
    from surgeon.exports.values import mapped

    return mapped(value, lambda one: one.meta["value"] if isinstance(one, fx.Node) else one)


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """List the steps that the result depends on, or that change something."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed or _changes(node):
            needed.add(node)
            needed.update(_skipped(one) for one in node.all_input_nodes)
    return [n for n in graph.nodes if n in needed and n.op not in ("placeholder", "output") and _skipped(n) is n]


def _changes(node: fx.Node) -> bool:
    name = _name_of(node.target)
    if node.op == "call_function":
        return name in _CHANGING or name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


def _skipped(node: fx.Node) -> fx.Node:
    """Give the step whose result this one passes on: a dropout does, in eval mode."""
    while (
        node.target in _DROPOUTS and node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False
    ):
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _main_inputs(node: fx.Node) -> list[fx.Node]:
    """List the steps whose variable a step may take over, the likeliest first."""
    if node.op == "call_function" and _name_of(node.target) in _INFIX:
        return [_skipped(one) for one in node.args if isinstance(one, fx.Node)]
    first = node.args[:1]
    if first and isinstance(first[0], tuple | list):
        first = tuple(first[0])
    return [_skipped(one) for one in first if isinstance(one, fx.Node)]


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _value(node: fx.Node) -> Any:
    """Give what a step gives in the run on the example."""
    return node.meta.get("value")


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))
