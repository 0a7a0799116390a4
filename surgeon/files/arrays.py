"""NumPy's scalars and arrays in a pickle: read where they hold numbers, and nothing else.

    numpy._core.multiarray.scalar(dtype, bytes)
    numpy._core.multiarray._reconstruct(numpy.ndarray, (0,), b'b'), filled with (1, shape, dtype, is_fortran, bytes)
    numpy.dtype('f8', False, True), filled with (3, '<', None, None, None, -1, -1, 0)

An array of objects holds a pickle's references in place of numbers, so its dtype is refused, as are dtypes with fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgeon.files.values import Value

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")
_SCALARS = tuple(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))
_ARRAYS = tuple(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core"))
_BYTE_ORDERS = ("<", "|", "=", ">")


def _is_dtype(args: Sequence[Value]) -> bool:
    kind = args[0].literal if len(args) == 3 else None
    are_flags = all(arg.literal in (False, True) for arg in args[1:])
    return isinstance(kind, str) and _NUMBER.fullmatch(kind) is not None and are_flags


def _is_scalar(args: Sequence[Value]) -> bool:
    return len(args) == 2 and _width(args[0]) == _length(args[1])


def _is_blank(args: Sequence[Value]) -> bool:
    is_array = len(args) == 3 and args[0].name == "numpy.ndarray" and args[1].literal == (0,)
    return is_array and (_length(args[2]) == 1 or args[2].literal in ("b", b"b"))


RULES: dict[str, Callable[[Sequence[Value]], bool]] = {
    "numpy.dtype": _is_dtype,
    **dict.fromkeys(_SCALARS, _is_scalar),
    **dict.fromkeys(_ARRAYS, _is_blank),
}


def objection(target: Value, state: Value) -> str | None:
    """Say what is wrong with how an array or a dtype is filled."""
    if target.made_by == "numpy.dtype":
        version, order, *rest = [part.literal for part in state.parts] if len(state.parts) == 8 else [None] * 8
        is_known = version in (3, 4) and order in _BYTE_ORDERS and rest == [None, None, None, -1, -1, 0]
        return None if state.is_tuple and is_known else "fills a NumPy dtype with more than a byte order"
    parts = state.parts if state.is_tuple else []
    shape = parts[1].sizes if len(parts) == 5 else None
    if shape is None or _width(parts[2]) is None or _length(parts[4]) is None:
        return "fills a NumPy array with something other than numbers"
    if math.prod(shape) * (_width(parts[2]) or 0) != _length(parts[4]) or len(shape) > 32:
        return "fills a NumPy array with more or fewer numbers than its shape says"
    return None


def is_ours(target: Value) -> bool:
    """Whether a value that is filled is an array or a dtype of NumPy."""
    return target.made_by in RULES


def globals_of(admitted: Mapping[str, object]) -> list[Any]:
    """Give the classes that torch has to know besides the names in a file: those of the dtypes themselves."""
    if not any(name.startswith("numpy.") for name in admitted):
        return []
    import numpy

    kinds = (*"?bBhHiIlLqQefdFD",)
    return [(kind, f"surgeon reads {kind.__name__}") for kind in {type(numpy.dtype(one)) for one in kinds}]


def _width(dtype: Value) -> int | None:
    """Say how many bytes a number of a dtype has."""
    if dtype.made_by != "numpy.dtype":
        return None
    return int(str(dtype.parts[1].parts[0].literal)[1:])


def _length(encoded: Value) -> int | None:
    """Say how many bytes a text stands for that was written as latin1."""
    if encoded.made_by == "builtins.bytes":
        return 0
    if encoded.made_by != "_codecs.encode" or encoded.parts[1].parts[1].literal == "ascii":
        return None
    return len(encoded.parts[1].parts[0].literal)
