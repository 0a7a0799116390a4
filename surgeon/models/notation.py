"""What one call of a model is given, and how `--input` and plans write it.

    call  = part; part; …           positional arguments, then named ones
    part  = value or name=value
    value = 1,3,224,224             a tensor of that shape, random floats; 1x3x224x224 is the same, () a single number
            1,10:int64              of that dtype; whole numbers are drawn from 0 … 9
            1,10:int64<1000         … or from 0 … 999
            [3,300,300;3,280,320]   a list of values
            (1,8;1,8)               a tuple of values
            {a=1,3,8,8;b=1,3,8,8}   a dict of values
            true, false, none       themselves

A plan keeps its example so that it can be drawn again; it never names a file or a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import CaptureError
from surgeon.models.draw import FLOATS, WHOLES, Draw

HOW_TO_WRITE = "Write batch, channels, height, width: --input 1,3,224,224."
_DTYPES = {name: getattr(torch, name) for name in (*FLOATS, *WHOLES, "bool")}
_DEEPEST = 20  # brackets within each other
_CONSTANTS = {"true": True, "false": False, "none": None}
_NAMED = re.compile(r"\s*([^\W\d]\w*)\s*=(.*)", re.DOTALL)


def read(text: str, leaf: Callable[[str], Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read positional and named arguments; `leaf` reads the values, shapes if it is not given.

    >>> read("1,3,8,8;mask=1x8x8:bool")[1]
    {'mask': Draw(shape=(1, 8, 8), dtype=torch.bool, bound=None)}

    Raises:
        CaptureError: what cannot be read.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for part in _split(text):
        if named := _NAMED.fullmatch(part):
            _add_(kwargs, named, leaf or draw)
        elif kwargs:
            raise CaptureError(
                f"{part!r} follows a named argument, but has no name", todo="Put named ones last: a;b;mask=c."
            )
        else:
            args.append(_value(part, leaf or draw))
    return tuple(args), kwargs


def write(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Write arguments; a value without a notation is written as its Python repr.

    >>> write((torch.zeros(1, 3, 8, 8), [True]), {"size": Draw((2,), torch.int64)})
    '1,3,8,8;[true];size=2:int64'
    """
    return ";".join([*map(_write, args), *(f"{name}={_write(value)}" for name, value in kwargs.items())])


def draw(text: str) -> Draw:
    """Read a shape, perhaps with a dtype.

    >>> draw("2,10:int64<1000")
    Draw(shape=(2, 10), dtype=torch.int64, bound=1000)
    """
    sides, has_dtype, dtype = text.partition(":")
    sides = sides.strip().removeprefix("(").removesuffix(")").strip()
    try:
        shape = tuple(int(part) for part in re.split("[,x×]", sides.lower())) if sides else ()
    except ValueError:
        shape = (0,)
    if min(shape, default=1) < 1 or not (sides or "(" in text):
        raise CaptureError(f"{text!r} is not a shape", todo=HOW_TO_WRITE)
    return Draw(shape, *_kind(dtype, text)) if has_dtype else Draw(shape)


def _kind(dtype: str, text: str) -> tuple[torch.dtype, int | None]:
    """Read what stands behind the colon: int64, int64<1000."""
    name, has_bound, bound = (part.strip() for part in dtype.partition("<"))
    if name not in _DTYPES:
        raise CaptureError(f"{text!r} names no dtype that can be drawn", todo=f"Possible are {', '.join(_DTYPES)}.")
    if not has_bound:
        return _DTYPES[name], None
    most = torch.iinfo(_DTYPES[name]).max + 1 if name in WHOLES else 0
    if not re.fullmatch("[0-9]{1,19}", bound) or not 1 <= int(bound) <= most:
        what = f"a bound from 1 to {most}" if most else "no bound; only whole numbers do"
        raise CaptureError(f"{text!r} cannot be drawn: {name} takes {what}", todo="Write --input 1,10:int64<1000.")
    return _DTYPES[name], int(bound)


def _split(text: str) -> list[str]:
    """Cut at the semicolons that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == ";" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
        if not 0 <= depth <= _DEEPEST:
            break
    if depth:
        why = "do not match" if depth <= _DEEPEST else "are nested too deeply"
        raise CaptureError(f"the brackets of {text!r} {why}", todo="Write a list as [3,300,300;3,280,320].")
    return parts


def _value(text: str, leaf: Callable[[str], Any]) -> Any:
    text = text.strip()
    inner = text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        return [_value(part, leaf) for part in _split(inner)]
    if text.startswith("(") and text.endswith(")") and ";" in inner:
        return tuple(_value(part, leaf) for part in _split(inner.rstrip().removesuffix(";")))
    if text.startswith("{") and text.endswith("}"):
        return _dict(inner, leaf)
    return _CONSTANTS[text] if text in _CONSTANTS else leaf(text)


def _dict(text: str, leaf: Callable[[str], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _split(text):
        named = _NAMED.fullmatch(part)
        if named is None:
            raise CaptureError(f"{part!r} has no name", todo="Write a dict as {image=1,3,8,8;mask=1,1,8,8}.")
        _add_(found, named, leaf)
    return found


def _add_(found: dict[str, Any], named: re.Match[str], leaf: Callable[[str], Any]) -> None:
    name, value = named.groups()
    if name in found:
        raise CaptureError(f"{name!r} is given twice", todo="Give every argument once.")
    found[name] = _value(value, leaf)


def _write(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(Draw.like(value))
    if isinstance(value, dict):
        return "{" + ";".join(f"{key}={_write(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ";".join(map(_write, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_write(part)};" for part in value) + ")"
    return str(value) if isinstance(value, Draw) else next(_constants(value), repr(value))


def _constants(value: Any) -> Iterator[str]:
    return (word for word, constant in _CONSTANTS.items() if value is constant)
