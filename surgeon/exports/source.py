"""A network → the text of a `model.py` of plain torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from surgeon.errors import printable
from surgeon.exports import classes, literals
from surgeon.exports.nested import nested
from surgeon.exports.parts import is_container, is_leaf, part_of
from surgeon.models.call import Inputs


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a network, the name of its class, and all tensors that it reads from its file."""

    text: str
    name: str
    tensors: Mapping[str, Tensor]


def source(model: nn.Module, inputs: Inputs, head: str) -> Source:
    """Write a network, which may be run and changed, as Python; `head` is what the file says about itself."""
    leaves = {module for module in model.modules() if is_leaf(module) and not is_container(module)}
    calls = nested(model, inputs, leaves.__contains__)
    root = part_of(model, calls)
    made = classes.written(root)
    body = [line for one in made for line in (*one.lines, "", "")]
    tensors = dict(_tensors(model))
    body += _loading(made[-1].name)
    return Source("\n".join([*_head(head), *_imports("\n".join(body)), "", "", *body, ""]), made[-1].name, tensors)


def _tensors(model: nn.Module):
    yield from model.state_dict().items()


def _head(head: str) -> list[str]:
    lines = [printable(line).replace("\\", "/").replace('"""', "'''") for line in head.splitlines()]
    return [f'"""{lines[0]}', *lines[1:], '"""', ""]


def _imports(body: str) -> list[str]:
    standard = ["from collections import OrderedDict"] if "OrderedDict" in body else []
    standard += ["from pathlib import Path"]
    typing = [one for one in ("Any", "NamedTuple") if re.search(rf"\b{one}\b", body)]
    standard += [f"from typing import {', '.join(typing)}"] if typing else []
    names = [one for one in ("Tensor",) if re.search(rf"\b{one}\b", body)]
    return [
        "from __future__ import annotations", "", *sorted(standard, key=lambda one: one.split()[1]), "",
        "import torch",
        *(["import torch.nn.functional as F"] if re.search(r"\bF\.", body) else []),
        f"from torch import {', '.join([*names, 'nn'])}",
    ]  # fmt: skip


def _loading(name: str) -> list[str]:
    return [
        f"def load(path: str | Path | None = None) -> {name}:",
        '    """Make the network, in eval mode, with the weights that are beside this file."""',
        "    from safetensors.torch import load_file",
        "",
        '    tensors = load_file(path or Path(__file__).with_name("model.safetensors"))',
        '    with torch.device("meta"):',
        f"        model = {name}()",
        "    model.load_state_dict(tensors, assign=True)",
        "    return model.eval()",
    ]
