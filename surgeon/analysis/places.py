"""Where in the user's code a step of a graph comes from: what messages say of it.

A step that calls a module is named by that module. Any other has only a name that tracing made up, such as `add_3`, so
tracing notes in its meta which line of whose forward was running.
"""

from __future__ import annotations

import ast
import dis
import functools
import itertools
import linecache
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from torch import fx, nn

from surgeon.models.copies import is_users

PLACE = "place"  # in the meta of a step
_LONGEST = 60  # of an expression that is quoted
_Span = tuple[int | None, int | None, int | None, int | None]


class Place(NamedTuple):
    """An instruction of the user's code, the line it is on, and the path of the module whose forward called it."""

    code: CodeType
    at: int
    line: int
    module: str


def note_(node: fx.Node, module: str, caller: CodeType) -> None:
    """Note where the user's code is now, in the forward of the module at this path, which `caller` traces."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not caller and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is not None and frame.f_code is not caller:
        node.meta[PLACE] = Place(frame.f_code, frame.f_lasti, frame.f_lineno, module)


def is_in_place(node: fx.Node) -> bool:
    """Whether a step comes from an operator such as `+=`, which tracing records as `+`."""
    place, home = node.meta.get(PLACE), getattr(node.target, "__module__", "")
    if node.op != "call_function" or not isinstance(place, Place) or home != "_operator":
        return False
    code = place.code.co_code
    return code[place.at] == dis.opmap["BINARY_OP"] and code[place.at + 1] in _in_place_operators()


@functools.cache
def _in_place_operators() -> frozenset[int]:
    """The arguments of the instruction BINARY_OP that stand for `+=` and its like."""
    sample = "; ".join(f"a {sign}= b" for sign in ("+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^"))
    found = dis.get_instructions(compile(sample, "", "exec"))
    return frozenset(one.arg for one in found if one.opname == "BINARY_OP" and one.arg is not None)


def said(node: fx.Node, kind: type[nn.Module] | None = None) -> str:
    """Name a step in the user's words: its module, of this class, or the code it comes from, or else its own name."""
    if node.op == "call_module":
        return f"'{node.target}'" + (f" ({kind.__name__})" if kind is not None else "")
    if node.op == "output":
        return "the output"
    place = _place_of(node)
    return f"'{node.name}'" if place is None else _written(node.name, place, place.module)


def said_of_all(node: fx.Node, kind: type[nn.Module] | None = None) -> str:
    """Name a step so that steps of the same class, or of the same line, are named alike."""
    if node.op == "call_module" and kind is not None:
        return with_article(kind)
    place = _place_of(node)
    return said(node) if place is None else _written(node.name, place, "")


def with_article(kind: type) -> str:
    """Name one module of a class.

    >>> with_article(nn.Identity), with_article(nn.GroupNorm)
    ('an Identity', 'a GroupNorm')
    """
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _place_of(node: fx.Node) -> Place | None:
    place = node.meta.get(PLACE) if node.op in ("call_function", "call_method") else None
    return place if isinstance(place, Place) else None


def _written(name: str, place: Place, module: str) -> str:
    function = place.code.co_qualname.rpartition("<locals>.")[2]
    file = Path(place.code.co_filename).name
    file = "GraphModule.code" if file.startswith("<eval_with_key>") else file  # which torch.fx has made
    where = f"{file}:{place.line}" + (f", {module}" if module else "")
    return f"{_expression(place) or repr(name)} in {function} ({where})"


def _expression(place: Place) -> str | None:
    """Quote the expression whose value the step is; nothing where its source is not at hand, or is too long."""
    span: _Span = next(itertools.islice(place.code.co_positions(), place.at // 2, None), (None,) * 4)
    first, last, start, stop = span
    if first is None or last is None or start is None or stop is None:
        return None
    lines = [linecache.getline(place.code.co_filename, at).encode() for at in range(first, last + 1)]
    lines[-1] = lines[-1][:stop]
    text = " ".join(b"".join([lines[0][start:], *lines[1:]]).decode(errors="replace").split())
    return f"`{text}`" if 0 < len(text) <= _LONGEST and _is_python(text) else None


def _is_python(text: str) -> bool:
    """Whether the source is what it was when it was compiled, as far as one can tell."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
