"""Ways to damage a file: its bytes, or the entries of an archive."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from collections.abc import Callable

Damage = Callable[[bytes, random.Random, Callable[[], bytes]], bytes]
BYTES: dict[str, Damage] = {}  # accidents, which can happen to every file
ZIPS: dict[str, Damage] = {}


def into(table: dict[str, Damage], name: str) -> Callable[[Damage], Damage]:
    return lambda damage: table.setdefault(name, damage)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, dice: random.Random, begin: float, end: float, count: int = 1) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        place = min(int(len(data) * dice.uniform(begin, end)), len(data) - 1)
        changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


for _name, _begin, _end in (("begin", 0.0, 0.1), ("middle", 0.1, 0.85), ("end", 0.85, 1.0)):
    BYTES[f"a bit flipped near the {_name}"] = lambda data, dice, other, b=_begin, e=_end: flip(data, dice, b, e)  # type: ignore[misc]
BYTES["many bits flipped"] = lambda data, dice, other: flip(data, dice, 0, 1, dice.randint(2, 50))
BYTES["cut short"] = lambda data, dice, other: data[: dice.randrange(len(data))]
BYTES["begin lost"] = lambda data, dice, other: data[dice.randrange(1, len(data)) :]


@into(BYTES, "a part lost")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    begin, end = sorted(dice.sample(range(len(data)), 2))
    return data[:begin] + data[end:]


@into(BYTES, "a part zero")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    begin, end = sorted(dice.sample(range(len(data)), 2))
    return data[:begin] + bytes(end - begin) + data[end:]


@into(BYTES, "a part of another file")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    found = other()
    begin, size = dice.randrange(len(data)), dice.randrange(1, len(found))
    return data[:begin] + found[:size] + data[begin + size :]


@into(BYTES, "the end of another file")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    found = other()
    return data[: dice.randrange(len(data))] + found[dice.randrange(len(found)) :]


@into(BYTES, "something appended")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    return data + dice.randbytes(dice.randint(1, 70000))


# ---- zip archives ---------------------------------------------------------------------------------------------------

Entries = list[tuple[str, bytes]]


def rezipped(data: bytes, change: Callable[[Entries], Entries]) -> bytes:
    """Write an archive again with other entries, and right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name, content in change(entries):
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _on_entries(name: str, change: Callable[[Entries, random.Random], Entries]) -> None:
    ZIPS[name] = lambda data, dice, other: rezipped(data, lambda entries: change(entries, dice))


def _renamed(entries: Entries, dice: random.Random) -> Entries:
    i = dice.randrange(len(entries))
    ends = (
        "data/99",
        "data.pkl",
        "../../evil",
        "/etc/passwd",
        "constants.pkl",
        "code/__torch__.py",
        "\x1b[31m",
        "x" * 5000,
    )
    name = dice.choice([f"{entries[i][0].split('/')[0]}/{end}" for end in ends] + ["", "ä€\n", "..", "data.pkl"])
    entries[i] = (name, entries[i][1])
    return entries


def _swapped(entries: Entries, dice: random.Random) -> Entries:
    i, j = dice.sample(range(len(entries)), 2)
    entries[i], entries[j] = (entries[i][0], entries[j][1]), (entries[j][0], entries[i][1])
    return entries


def _changed_pickle(entries: Entries, dice: random.Random) -> Entries:
    """Flip bits of the pickle, and write a right checksum."""
    return [(n, flip(c, dice, 0, 1, dice.randint(1, 4)) if n.endswith("data.pkl") else c) for n, c in entries]


def _changed_words(entries: Entries, dice: random.Random) -> Entries:
    """Put another name into the pickle, of the same length or not."""
    words = (
        b"torch._utils",
        b"_rebuild_tensor_v2",
        b"torch.nn.modules.conv",
        b"Conv2d",
        b"collections",
        b"surgeon.nn",
        b"training",
        b"_modules",
        b"_parameters",
        b"weight",
        b"storage",
        b"FloatStorage",
        b"cpu",
    )
    names = (
        b"posix",
        b"system",
        b"os",
        b"builtins",
        b"eval",
        b"getattr",
        b"torch.hub",
        b"load",
        b"__class__",
        b"__dict__",
        b"forward",
        b"meta",
        b"cuda:0",
        b"\xff",
        b"",
    )
    old, new = dice.choice(words), dice.choice(names)
    return [(n, c.replace(old, new) if n.endswith("data.pkl") else c) for n, c in entries]


def _missing(entries: Entries, dice: random.Random) -> Entries:
    del entries[dice.randrange(len(entries))]
    return entries


def _emptied(entries: Entries, dice: random.Random) -> Entries:
    i = dice.randrange(len(entries))
    entries[i] = (entries[i][0], b"")
    return entries


_on_entries("an entry renamed", _renamed)
_on_entries("an entry missing", _missing)
_on_entries("an entry twice", lambda e, dice: [*e, (dice.choice(e)[0], dice.randbytes(64))])
_on_entries("two entries exchanged", _swapped)
_on_entries("an entry empty", _emptied)
_on_entries("an entry cut short", lambda e, dice: [(n, c[: dice.randrange(len(c) + 1)]) for n, c in e])
_on_entries("entries in another order", lambda e, dice: dice.sample(e, len(e)))
_on_entries("the pickle changed", _changed_pickle)
_on_entries("names in the pickle changed", _changed_words)
_on_entries("a huge entry", lambda e, dice: [*e, (e[0][0].split("/")[0] + "/data/98", bytes(2_000_000))])
_on_entries("a script beside it", lambda e, dice: [*e, (e[0][0].split("/")[0] + "/code/x.py", b"import os")])


@into(ZIPS, "sizes in the directory changed")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    changed, places = bytearray(data), []
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        places.append(place)
        place = data.find(b"PK\x01\x02", place + 4)
    field = dice.choice((16, 20, 24, 42))  # checksum, sizes, where the entry lies
    struct.pack_into(
        "<I", changed, dice.choice(places) + field, dice.choice((0, 1, 2**31, 2**32 - 1, dice.randrange(2**32)))
    )
    return bytes(changed)


@into(ZIPS, "a compressed entry that unpacks to much")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries:
            more = bytes(30_000_000) if name.endswith(("data/0", "data.pkl")) else b""
            new.writestr(zipfile.ZipInfo(name), content + more, zipfile.ZIP_DEFLATED)
    return out.getvalue()
