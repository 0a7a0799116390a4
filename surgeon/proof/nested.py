"""Arguments and outputs of any nesting as plain data with tensors beside it, and back.

["tensor", 3]                            the third tensor of the list beside it
["tuple", […]], ["list", […]]            their items
["dict", [["name", …], …]]               their items, in order
["value", 0.5]                           a number, a text, true, false or null
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from surgeon.errors import StoreError, VerifyError
from surgeon.proof.distance import dense

_DEEPEST = 64  # levels; outputs of networks have one to three


def flattened(value: Any, tensors: list[Tensor]) -> list[Any]:
    """Describe a value; its tensors are added to the list.

    >>> import torch
    >>> found = []
    >>> flattened({"out": torch.zeros(2), "size": 3}, found), len(found)
    (['dict', [['out', ['tensor', 0]], ['size', ['value', 3]]]], 1)

    Raises:
        VerifyError: it holds something that is neither.
    """
    if isinstance(value, Tensor):
        tensors.append(dense(value))
        return ["tensor", len(tensors) - 1]
    if isinstance(value, str | bool | int | float | None):
        return ["value", value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ["dict", [[key, flattened(one, tensors)] for key, one in value.items()]]
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [flattened(one, tensors) for one in value]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return flattened({one.name: getattr(value, one.name) for one in dataclasses.fields(value)}, tensors)
    raise VerifyError(
        f"a {type(value).__name__} cannot be kept in a file of outputs",
        todo="Let the model take and return tensors, alone or in dicts, lists, tuples or dataclasses.",
    )


def built(described: Any, tensors: Sequence[Tensor], depth: int = 0) -> Any:
    """Make the value again: its dicts are dicts, its lists and tuples what they were.

    Raises:
        StoreError: this is no such description, as in a file that somebody has changed.
    """
    match described:
        case ["tensor", int(i)] if not isinstance(i, bool) and 0 <= i < len(tensors):
            return tensors[i]
        case ["value", str() | bool() | int() | float() | None as one]:
            return one
        case ["tuple" | "list" as kind, list(items)] if depth < _DEEPEST:
            made = [built(one, tensors, depth + 1) for one in items]
            return tuple(made) if kind == "tuple" else made
        case ["dict", list(items)] if depth < _DEEPEST and all(_is_item(one) for one in items):
            return {key: built(one, tensors, depth + 1) for key, one in items}
    raise StoreError("the structure of a call or an output in the file is not one", todo="Save the outputs again.")


def plain(value: Any) -> Any:
    """Turn an output into what `built` makes of it, so that the two can be matched: no classes of its own are left."""
    tensors: list[Tensor] = []
    return built(flattened(value, tensors), tensors)


def _is_item(one: Any) -> bool:
    return isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)
