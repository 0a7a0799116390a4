"""Values as Python text, and which names may stand in Python as they are.

Whatever comes out of a file, a name or a string, becomes a string literal unless it is a plain identifier.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections import OrderedDict
from typing import Any

import torch

from surgeon.python.layout import Bracket, Code, call

_WRITTEN = (
    *("self", "torch", "nn", "F", "math", "Tensor", "Any", "Path", "OrderedDict", "NamedTuple", "load", "annotations"),
    *("getattr", "setattr", "slice", "float", "super", "abs", "tuple", "list", "dict", "int", "bool", "str"),
)  # what the text itself uses
IN_USE = frozenset({*keyword.kwlist, *_WRITTEN})
RESERVED = IN_USE | {*keyword.softkwlist, *dir(builtins)}


class NoTextError(ValueError):
    """A value that cannot be written as Python."""


def is_name(text: str) -> bool:
    """Whether a name can stand behind a dot: names that begin with two underscores are mangled inside a class.

    >>> is_name("conv1"), is_name("0"), is_name("lambda"), is_name("__x"), is_name('x"); import os')
    (True, False, False, False, False)
    """
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def as_name(text: str, otherwise: str, taken: frozenset[str] | set[str] = RESERVED, *, link: str = "_") -> str:
    """Make a name of a text, which is none of those that are taken.

    >>> as_name("conv1.weight", "x"), as_name("class", "x"), as_name("0", "x")
    ('conv1_weight', 'class_', 'x_0')
    """
    made = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    if not made or not made[0].isalpha():
        made = f"{otherwise}_{made}".rstrip("_")
    if keyword.iskeyword(made):
        made += "_"
    found, count = made, 2
    while found in taken:
        found, count = f"{made}{link}{count}", count + 1
    return found


def string(text: str) -> str:
    r"""Write a string literal in the quotes that need fewer escapes, in ASCII.

    >>> print(string('a"b'), string("it's"), string("a\nb"))
    'a"b' "it's" "a\nb"
    """
    escaped = text.encode("unicode_escape", "surrogatepass").decode("ascii")
    quote = "'" if text.count('"') > text.count("'") else '"'
    return quote + escaped.replace(quote, f"\\{quote}") + quote


def number(value: float) -> str:
    """Write a number, also one that Python has no literal for."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def text(value: Any) -> Code:
    """Write a value.

    >>> str(text((1, None, float("inf"), torch.float16, {"a": [True, "b"]})))
    '(1, None, float("inf"), torch.float16, {"a": [True, "b"]})'

    Raises:
        NoTextError: it is of a kind that has no text.
    """
    if value is None or value is Ellipsis or type(value) is bool:
        return "..." if value is Ellipsis else repr(value)
    if type(value) in (int, float):
        return number(value)
    if type(value) is str:
        return string(value)
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({string(str(value))})"
    return _nested(value)


def _nested(value: Any) -> Code:
    if isinstance(value, tuple) and (not hasattr(value, "_fields")):
        return Bracket("(", tuple(("", text(part)) for part in value), ")")
    if type(value) is list:
        return Bracket("[", tuple(("", text(part)) for part in value), "]")
    if type(value) is dict:
        return Bracket("{", tuple((f"{text(key)}: ", text(part)) for key, part in value.items()), "}")
    if type(value) is OrderedDict:
        return call("OrderedDict", [text(list(value.items()))])
    raise NoTextError(f"a {type(value).__name__} cannot be written as Python")
