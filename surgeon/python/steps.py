"""What can be said of one step of a graph: how it is written, what it reads, and whether it is needed."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgeon.python import literals
from surgeon.python.layers import same
from surgeon.python.literals import NoTextError
from surgeon.python.values import mapped

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "matmul": "@", "and_": "&",
    "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "pow": "**",
}  # fmt: skip
RANKS = {
    "==": 0, "!=": 0, "<": 0, "<=": 0, ">": 0, ">=": 0, "|": 0, "^": 0, "&": 0, "<<": 0, ">>": 0, "+": 2, "-": 2,
    "*": 3, "/": 3, "//": 3, "%": 3, "@": 3, "**": 5,
}  # fmt: skip
HIGHEST = 9
SAYS_LITTLE = re.compile(r"\d+$|relu|act|bn|norm|drop", re.IGNORECASE)  # names of modules, for a variable
PREFIX = {"neg": "-", "invert": "~", "pos": "+"}
CHANGING = {"iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/="}
PLAIN = {operator.abs: "abs", math.ceil: "math.ceil", math.floor: "math.floor", OrderedDict: "OrderedDict"}
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
HOMES = (
    ("torch", torch), ("F", F), ("torch.linalg", torch.linalg), ("torch.special", torch.special),
    ("torch.fft", torch.fft),
)  # fmt: skip


def rank_of(node: fx.Node) -> int:
    name = name_of(node.target)
    if getattr(operator, name, None) is not node.target:
        return HIGHEST
    return RANKS[INFIX[name]] if name in INFIX else 4 if name in PREFIX else HIGHEST


METHODS = {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}


def unpacked_parts(node: fx.Node) -> list[fx.Node] | None:
    """Give the steps that read each part of what a module gives once, if nothing else reads it."""
    value, users = value_of_step(node), list(node.users)
    if node.op != "call_module" or type(value) not in (tuple, list) or len(users) < 2 or len(users) != len(value):
        return None
    if any(
        one.target is not operator.getitem or not isinstance(part, Tensor)
        for one, part in zip(users, value, strict=True)
    ):
        return None
    by_place = {one.args[1]: one for one in users}
    return [by_place[i] for i in range(len(value))] if set(by_place) == set(range(len(value))) else None


def pair_names(value: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Name what is unpacked: two maps of which the second has half the resolution are two streams."""
    if len(value) == 2 and all(one.dim() == 4 for one in value):
        high, low = (one.shape[-2:] for one in value)
        if tuple(low) == tuple(-(-side // 2) for side in high):
            return "high", "low"
    return ("",) * len(value)


def read_directly(whole: Any, place: Any) -> tuple[Any, Any]:
    """Read shape[-2:][0] as shape[-2]."""
    if type(place) is int and place >= 0 and isinstance(whole, fx.Node) and whole.target is operator.getitem:
        cut = whole.args[1]
        is_of_sizes = isinstance(whole.args[0], fx.Node) and isinstance(whole.args[0].meta.get("value"), torch.Size)
        is_rest = isinstance(cut, slice) and cut.step is None and cut.stop is None and type(cut.start) is int
        if is_of_sizes and isinstance(cut, slice) and is_rest and (cut.start + place < 0 or cut.start >= 0):
            return whole.args[0], cut.start + place
    return whole, place


def telling(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
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


def all_of(value: tuple[Any, ...] | list[Any]) -> fx.Node | None:
    """Give the step whose result is just these values, each of them in its place."""
    nodes = [skipped(one) for one in value if isinstance(one, fx.Node)]
    if not nodes or len(nodes) < len(value) or any(one.target is not operator.getitem for one in nodes):
        return None
    source = nodes[0].args[0]
    is_all = isinstance(source, fx.Node) and [one.args for one in nodes] == [(source, i) for i in range(len(nodes))]
    if not is_all or not isinstance(source, fx.Node):
        return None
    known = source.meta["value"]
    is_alike = type(known) in (list, tuple) and isinstance(known, list) == isinstance(value, list)
    return source if is_alike and len(known) == len(value) else None


def function_text(function: Any) -> str:
    """Name a function of torch.

    Raises:
        NoTextError: it is none that torch offers under a public name.
    """
    if function in PLAIN:
        return PLAIN[function]
    name = name_of(function)
    for home, module in HOMES:
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
    return mapped(value, lambda one: one.meta["value"] if isinstance(one, fx.Node) else one)


def needed(graph: fx.Graph) -> list[fx.Node]:
    """List the steps that the result depends on, or that change something."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed or changes(node):
            needed.add(node)
            needed.update(skipped(one) for one in node.all_input_nodes)
    return [n for n in graph.nodes if n in needed and n.op not in ("placeholder", "output") and skipped(n) is n]


def changes(node: fx.Node) -> bool:
    name = name_of(node.target)
    if node.op == "call_function":
        return name in CHANGING or name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


def skipped(node: fx.Node) -> fx.Node:
    """Give the step whose result this one passes on: a dropout does, in eval mode."""
    while node.target in DROPOUTS and node.kwargs.get("training", (*args_of(node), True, True, True)[2]) is False:
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        node = source
    return node


def main_inputs(node: fx.Node) -> list[fx.Node]:
    """List the steps whose variable a step may take over, the likeliest first."""
    if node.op == "call_function" and name_of(node.target) in INFIX:
        return [skipped(one) for one in node.args if isinstance(one, fx.Node)]
    first = node.args[:1]
    if first and isinstance(first[0], tuple | list):
        first = tuple(first[0])
    return [skipped(one) for one in first if isinstance(one, fx.Node)]


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def args_of(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def value_of_step(node: fx.Node) -> Any:
    """Give what a step gives in the run on the example."""
    return node.meta.get("value")


def name_of(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))
