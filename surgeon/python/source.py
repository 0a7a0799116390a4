"""A network → the text of a `model.py` of plain torch, and the tensors that it reads from its file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon.errors import CaptureError, printable
from surgeon.models.call import Inputs
from surgeon.python import classes, literals
from surgeon.python.layout import call, lines
from surgeon.python.nested import TODO, Call, nested
from surgeon.python.parts import Layer, Own, Part, is_container, is_leaf, part_of, reach


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a network, the name of its class, and all tensors that it reads from its file, each once."""

    text: str
    name: str
    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]  # those that take no part in what it computes
    tuples: Mapping[str, type]  # the classes of named tuples that it gives, which the text has again


def source(model: nn.Module, inputs: Inputs, head: str) -> Source:
    """Write a network, which may be run and changed, as Python; `head` is what the file says about itself.

    Raises:
        CaptureError: something in it has no text.
    """
    leaves = {module for module in model.modules() if is_leaf(module) and not is_container(module)}
    calls = nested(model, inputs, leaves.__contains__)
    root = part_of(model, calls)
    made = classes.written(root)
    held = dict(_held(model, calls))
    names = [name for name in _names(root, "", model) if name in held]
    first: dict[int, str] = {}
    ties = {name: known for name in names if (known := first.setdefault(id(held[name]), name)) != name}
    body = [line for one in made for line in (*one.lines, "", "")]
    body += [*_loading(made[-1].name, ties, model), ""]
    text = "\n".join(body)
    kinds = {name: kind for name, kind in _tuples(calls).items() if re.search(rf"\b{name}\b", text)}
    tuples = [line for name, kind in kinds.items() for line in _tuple_lines(name, kind)]
    head_lines = [*_head(head), *_imports("\n".join([*tuples, text])), "", "", *tuples]
    tensors = {name: held[name].detach() for name in names if name not in ties}
    left_out = sorted(name for name in model.state_dict() if name not in names)
    return Source("\n".join(head_lines) + "\n" + text, made[-1].name, tensors, tuple(left_out), kinds)


def _held(model: nn.Module, calls: Mapping[nn.Module, list[Call]]) -> Iterator[tuple[str, Tensor]]:
    """List all tensors of a model by name, and those that its code has made while it was traced."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    paths = {module: path for path, module in model.named_modules(remove_duplicate=False)}
    for module, found in calls.items():
        for one in found:
            for name, tensor in one.constants.items():
                yield f"{paths[module]}.{name}".removeprefix("."), tensor


def _names(part: Part, path: str, model: nn.Module) -> Iterator[str]:
    """Name the tensors that the modules in the text have."""
    begin = f"{path}." if path else ""
    if isinstance(part, Layer):
        if part.kind != "nn.Identity":
            module = model.get_submodule(path)
            yield from (f"{begin}{name}" for name, _ in (*module.named_parameters(), *module.named_buffers()))
        return
    if isinstance(part, Own):
        yield from (f"{begin}{one.name}" for one in part.tensors)
    for name, child in part.children.items():
        yield from _names(child, f"{begin}{name}", model)


def _head(head: str) -> list[str]:
    """Write the docstring of the file; what came from a file or a user cannot end it."""
    said = [printable(line).replace("\\", "/").replace('"', "'").rstrip() for line in head.splitlines() or [""]]
    return [f'"""{said[0]}', *said[1:], '"""', ""]


def _imports(body: str) -> list[str]:
    def is_used(name: str) -> bool:
        return re.search(rf"(?<![\w.\"']){name}\b", body) is not None

    typing = [name for name in ("Any", "NamedTuple") if is_used(name)]
    return [
        "from __future__ import annotations",
        "",
        *(["import math"] if is_used("math") else []),
        *(["from collections import OrderedDict"] if is_used("OrderedDict") else []),
        "from pathlib import Path",
        *([f"from typing import {', '.join(typing)}"] if typing else []),
        "",
        "import torch",
        *(["import torch.nn.functional as F"] if is_used("F") else []),
        f"from torch import {'Tensor, nn' if is_used('Tensor') else 'nn'}",
    ]


def _tuples(calls: Mapping[nn.Module, list[Call]]) -> dict[str, type]:
    """Find the classes of named tuples that modules give."""
    kinds: dict[str, type] = {}
    for found in calls.values():
        for one in found:
            for kind in _kinds_of(one.result):
                if not literals.is_name(kind.__name__) or kinds.setdefault(kind.__name__, kind) is not kind:
                    raise CaptureError(f"a named tuple is called {kind.__name__!r}, as something else is", todo=TODO)
    return kinds


def _tuple_lines(name: str, kind: Any) -> list[str]:
    return [f"class {name}(NamedTuple):", *(f"    {one}: Any" for one in kind._fields), "", ""]


def _kinds_of(value: object) -> Iterator[type]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield type(value)
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _kinds_of(part)


def _loading(name: str, ties: Mapping[str, str], model: nn.Module) -> list[str]:
    return [
        f"def load(path: str | Path | None = None) -> {name}:",
        '    """Make the network, in eval mode, with the weights that are beside this file."""',
        "    from safetensors.torch import load_file",
        "",
        '    tensors = load_file(path or Path(__file__).with_name("model.safetensors"))',
        *(
            line
            for tied, first in ties.items()
            for line in lines(f"tensors[{literals.string(tied)}] = ", f"tensors[{literals.string(first)}]", indent=4)
        ),
        '    with torch.device("meta"):',
        f"        model = {name}()",
        "    model.load_state_dict(tensors, assign=True)",
        *(line for tied, first in ties.items() for line in _tied(tied, first, model)),
        "    return model.eval()",
    ]


def _tied(tied: str, first: str, model: nn.Module) -> list[str]:
    """Write that two names are one tensor again."""
    source = "model" + reach(model, first).removeprefix("self") if reach(model, first).startswith("self") else ""
    path, _, name = tied.rpartition(".")
    holder = "model" + (reach(model, path).removeprefix("self") if path else "")
    if not source:
        return []
    if literals.is_name(name):
        return lines(f"{holder}.{name} = ", source, indent=4)
    return lines("", call("setattr", [holder, literals.string(name), source]), indent=4)
