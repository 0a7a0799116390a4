"""What a pickle makes, on paper: one value for every step of its program, and how such values are read and weighed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DEEPEST = 200  # levels of lists, dicts and modules within each other; an honest network has a few dozen
_LITERALS = frozenset(["BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING"])
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = frozenset(["EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"])
_CONTAINERS = _TUPLES | {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_WIDTHS = {  # bytes in a number of each kind of storage that torch.save names
    1: ("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"),
    2: ("Half", "BFloat16", "Short"),
    4: ("Float", "Int", "QInt32"),
    8: ("Double", "Long", "ComplexFloat"),
    16: ("ComplexDouble",),
}
_STORAGES = {f"torch.{kind}Storage": width for width, kinds in _WIDTHS.items() for kind in kinds}
_STORAGES["torch.storage.UntypedStorage"] = 1
UNKNOWN: Any = object()  # what is no plain value


@dataclass(eq=False, slots=True)
class Value:
    """Something on the unpickler's stack: the opcode that put it there, with which argument, and what went into it."""

    opcode: str
    argument: Any = None  # of a GLOBAL, its dotted name; of a BINPERSID, the bytes of its storage
    parts: list[Value] = field(default_factory=list)
    is_filled: bool = False
    is_checked: bool = False  # a __setstate__ has looked at it

    @property
    def name(self) -> str:
        """The name that a GLOBAL stands for; empty for everything else."""
        return str(self.argument) if self.opcode == "GLOBAL" else ""

    @property
    def made_by(self) -> str:
        """The name of the class or function that made an object."""
        return self.parts[0].name if self.opcode in ("REDUCE", "NEWOBJ") else ""

    @property
    def is_tuple(self) -> bool:
        return self.opcode in _TUPLES

    @property
    def literal(self) -> Any:
        """The number, text or constant that this is, or a tuple of them; `UNKNOWN` if it is none."""
        if self.is_tuple:
            parts = tuple(UNKNOWN if part.is_tuple else part.literal for part in self.parts)
            return UNKNOWN if any(part is UNKNOWN for part in parts) else parts
        return self.argument if self.opcode in _LITERALS else _CONSTANTS.get(self.opcode, UNKNOWN)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The whole numbers, none of them negative, in a tuple of them."""
        sizes = self.literal if self.is_tuple else None
        return sizes if isinstance(sizes, tuple) and all(type(one) is int and one >= 0 for one in sizes) else None

    def all_parts(self) -> Iterator[Value]:
        """Walk over this value and all that went into it; containers may hold themselves."""
        seen, waiting = {id(self)}, [self]
        while waiting:
            value = waiting.pop()
            yield value
            waiting += [part for part in value.parts if id(part) not in seen]
            seen.update(map(id, value.parts))

    def check_(self) -> None:
        """Note that a __setstate__ has looked at all of this."""
        waiting = [self]
        while waiting:
            value = waiting.pop()
            if not value.is_checked:  # what has been looked at does not change, so its parts have been, too
                value.is_checked = True
                waiting += value.parts


def bytes_per_number(kind: str) -> int | None:
    """Say how many bytes a number of a storage or dtype has; None where the name is no such thing."""
    if kind in _STORAGES:
        return _STORAGES[kind]
    library, _, name = kind.rpartition(".")
    dtype = getattr(torch, name, None) if library == "torch" else None
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None


def fits(storage: Value, offset: Any, sizes: Sequence[int] | None, strides: Sequence[int] | None, size: int) -> bool:
    """Whether a tensor lies within the bytes of its storage; `size` is that of one number."""
    if storage.opcode != "BINPERSID" or sizes is None or strides is None or len(sizes) != len(strides):
        return False
    if type(offset) is not int or offset < 0:
        return False
    if 0 in sizes:
        return all(one < 2**62 for one in sizes) and math.prod(filter(None, sizes)) < 2**62
    last = offset + sum((one - 1) * stride for one, stride in zip(sizes, strides, strict=True))
    # A tensor with strides of 0 has more numbers than memory; what copies it needs memory for all of them.
    held = int(storage.argument)
    return (last + 1) * size <= held and math.prod(sizes) <= max(16 * held, 2**24)


def excess(root: Value, count: int) -> str | None:
    """Say what would take forever to look at: values nested too deeply, or containers that multiply when unfolded."""
    sizes: dict[int, int] = {}  # of what has been walked through, with shared containers counted as often as they stand
    is_open: set[int] = set()
    trail: list[tuple[Value, Iterator[Value]]] = [(root, iter(root.parts))]
    is_open.add(id(root))
    while trail:
        value, parts = trail[-1]
        part = next((one for one in parts if id(one) not in sizes and id(one) not in is_open), None)
        if part is not None:
            trail.append((part, iter(part.parts)))
            is_open.add(id(part))
            if len(trail) > DEEPEST:
                return f"nests values in more than {DEEPEST} levels"
            continue
        trail.pop()
        is_open.discard(id(value))
        held = value.parts if value.opcode in _CONTAINERS else ()
        sizes[id(value)] = 1 + sum(sizes.get(id(one), 1) if one.opcode in _CONTAINERS else 1 for one in held)
        if sizes[id(value)] > 16 * count + 10_000:
            return "holds lists within lists that unfold to more than memory holds"
    return None
