"""Which classes and functions are plain: nothing of theirs runs while an object is made from a file.

An object is made blank (`__new__`), and its attributes are put into its `__dict__` or its slots. What a class adds to
that would run with values of the file's choice, so a class that adds anything is refused, and is told apart by asking
where the method comes from. An Enum is called with the value of one of its members, which looks that member up.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import TypeGuard

from torch import nn

_BY_ATTRIBUTE = ("__getattribute__", "__getattr__", "__setattr__")


def is_enum(found: object) -> TypeGuard[type[enum.Enum]]:
    return isinstance(found, type) and issubclass(found, enum.Enum)


def is_named_tuple(kind: object) -> TypeGuard[type[tuple[object, ...]]]:
    """Whether a class is what `namedtuple` or `NamedTuple` has made, or makes its objects in the same way."""
    is_tuple = isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
    return is_tuple and str(getattr(kind.__new__, "__module__", "")).startswith("namedtuple_")


def obstacle(found: type | types.FunctionType) -> str | None:
    """Say why a file may not hold such a function, or objects of such a class."""
    if isinstance(found, types.FunctionType):
        return None if found.__qualname__.isidentifier() else "a function inside another"
    if "__del__" in _own(found, ("__del__",)):
        return "its objects run code when they are deleted, in __del__"
    if issubclass(found, nn.Module):
        return None
    return _of_enum(found) if is_enum(found) else _of_data(found)


def keeps_hash(kind: type) -> bool:
    """Whether a class leaves it to Python what its objects are worth as keys of a dict."""
    hashed = getattr(kind, "__hash__", None)
    return hashed in (object.__hash__, tuple.__hash__, enum.Enum.__hash__, nn.Module.__hash__)


def slots_of(kind: type) -> frozenset[str]:
    """Name the slots of a class and its bases."""
    declared = [vars(one).get("__slots__", ()) for one in kind.__mro__]
    return frozenset(name for names in declared for name in ([names] if isinstance(names, str) else names))


def _of_enum(kind: type[enum.Enum]) -> str | None:
    if getattr(kind._missing_, "__module__", "") != "enum":
        return "an Enum with a _missing_ of its own, which would run"
    if type(kind).__call__ is not enum.EnumMeta.__call__:
        return "an Enum whose own class runs when a member is looked up"
    return None


def _of_data(kind: type) -> str | None:
    if is_named_tuple(kind):
        return None
    builtin = next((base.__name__ for base in kind.__mro__[1:-1] if base.__module__ == "builtins"), None)
    if builtin is not None:
        return f"a kind of {builtin}, which torch's safe reader does not make"
    allowed = {"__setattr__"} if dataclasses.is_dataclass(kind) else set()  # a frozen one's is not used
    own = _own(kind, ("__new__", "__setstate__", "__reduce__", "__reduce_ex__", *_BY_ATTRIBUTE))
    if own := [name for name in own if name not in allowed]:
        return f"its objects run code when they are made, in {own[0]}"
    return None


def _own(kind: type, names: tuple[str, ...]) -> list[str]:
    """Name the methods that a class has of its own; those that `dataclass(slots=True)` has made are not."""
    between = [one for one in kind.__mro__ if one.__module__ not in ("builtins", "typing", "abc")]
    found = [(name, vars(one)[name]) for name in names for one in between if name in vars(one)]
    return [name for name, value in found if getattr(value, "__module__", "") != "dataclasses"]
