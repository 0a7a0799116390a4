"""Ways to damage what a file says: headers and manifests of safetensors, plans and recipes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hostile_damage import BYTES, ZIPS, Damage, into

HEADERS: dict[str, Damage] = {}  # of safetensors
TEXTS: dict[str, Damage] = {}  # of plans and recipes


# ---- headers of safetensors -----------------------------------------------------------------------------------------

Header = dict[str, Any]


def reheaded(data: bytes, change: Callable[[Header], Any]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    text = change(json.loads(data[8 : 8 + size]))
    header = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else json.dumps(text).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _on_header(name: str, change: Callable[[Header, random.Random], Any]) -> None:
    HEADERS[name] = lambda data, dice, other: reheaded(data, lambda header: change(header, dice))


def _tensor(header: Header, dice: random.Random) -> dict[str, Any]:
    return header[dice.choice([key for key in header if key != "__metadata__"])]


def _with(field: str, values: Callable[[Any, random.Random], Any]) -> Callable[[Header, random.Random], Header]:
    def change(header: Header, dice: random.Random) -> Header:
        entry = _tensor(header, dice)
        entry[field] = values(entry[field], dice)
        return header

    return change


def _offsets(old: list[int], dice: random.Random) -> Any:
    a, b = old
    return dice.choice(
        [
            [0, b],
            [a, b + 4],
            [b, a],
            [-4, b],
            [a, 2**63],
            [2**64, 2**65],
            [a],
            [],
            "x",
            None,
            [a + 1, b + 1],
            [0, 0],
            [1.5, 3.5],
        ]
    )


def _shape(old: list[int], dice: random.Random) -> Any:
    return dice.choice(
        [[*old, 1], [*old, 2], [2**40], [-1], [0], [2**32, 2**32], old[::-1], [], None, [1] * 3000, ["a"], [[1]]]
    )


def _renamed_tensor(header: Header, dice: random.Random) -> Header:
    old = dice.choice(list(header))
    header[dice.choice(["", "a.b", "__class__", "\x1b[31m", "x" * 9999])] = header.pop(old)
    return header


def _left_out(header: Header, dice: random.Random) -> Header:
    del header[dice.choice(list(header))]
    return header


def _in_one_place(header: Header, dice: random.Random) -> Header:
    _tensor(header, dice)["data_offsets"] = _tensor(header, dice)["data_offsets"]
    return header


_on_header("offsets changed", _with("data_offsets", _offsets))
_on_header("a shape changed", _with("shape", _shape))
_on_header(
    "a dtype changed",
    _with(
        "dtype", lambda old, dice: dice.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", "", 3, None])
    ),
)
_on_header("a tensor renamed", _renamed_tensor)
_on_header("a tensor left out", _left_out)
_on_header("two tensors in one place", _in_one_place)
_on_header(
    "a header that is no object",
    lambda h, dice: dice.choice(["[]", "null", "{", "", "[" * 100000, '{"a":' * 50000, "\ud800", json.dumps(h)[:-5]]),
)
_on_header("a key twice", lambda h, dice: json.dumps(h)[:-1] + "," + json.dumps(h)[1:])


@into(HEADERS, "another length of the header")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", dice.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, len(data)))) + data[8:]


def _manifest(change: Callable[[Any, random.Random], Any]) -> Callable[[Header, random.Random], Header]:
    """Change the manifest in a header; a file without one gets one that is odd."""

    def on(header: Header, dice: random.Random) -> Header:
        metadata = header.setdefault("__metadata__", {})
        for key in list(metadata) or ["surgeon"]:
            data = (
                json.loads(metadata[key])
                if str(metadata.get(key, "")).startswith("{")
                else {"format": 2, "architecture": None, "history": []}
            )
            changed = change(data, dice)
            metadata[key] = changed if isinstance(changed, str) else json.dumps(changed)
        return header

    return on


ODD: tuple[Any, ...] = (
    None,
    -1,
    2**70,
    1e308,
    float("nan"),
    "",
    "x" * 100000,
    [],
    {},
    [[]],
    True,
    "\x1b[2J",
    "../../x",
    {"a": {"b": 1}},
    [1, 3, 9000, 9000],
)


def spoil(data: Any, dice: random.Random, times: int = 1) -> Any:
    """Put something odd at a random place of nested data, or take something away."""
    for _ in range(times):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                walk(node[key])

        walk(data)
        if not places:
            return data
        node, key = dice.choice(places)
        if dice.random() < 0.25:
            del node[key]
        elif dice.random() < 0.2 and isinstance(node, dict):
            node[dice.choice(("extra", "__class__", "", "py/object"))] = dice.choice(ODD)
        else:
            node[key] = dice.choice(ODD)
    return data


NAMES = (
    "os:system",
    "builtins:eval",
    "hostile_payload:main",
    "hostile_payload.py:main",
    "../x.py:Net",
    "torch.hub:load",
    "torchvision:os",
    "timm:../x",
    "timm:hf-hub:x/y",
    "torch:load",
    "subprocess:run",
    "surgeon:load",
    "x.pt",
    "/etc/passwd",
    "",
)


def _architecture(data: Any, dice: random.Random) -> Any:
    data["architecture"] = dice.choice(
        [
            {"name": dice.choice(NAMES), "args": {}},
            {"name": "timm:resnet10t", "args": {"pretrained": True}},
            {"name": "timm:resnet10t", "args": {"checkpoint_path": "canary"}},
            {"name": "torchvision:resnet18", "args": {"weights": "DEFAULT"}},
            7,
            [],
            {"name": 3},
        ]
    )
    return data


_on_header("the manifest's architecture changed", _manifest(_architecture))
_on_header("the manifest changed", _manifest(lambda data, dice: spoil(data, dice, dice.randint(1, 3))))
_on_header(
    "the manifest is no JSON", _manifest(lambda data, dice: dice.choice(["", "{", "[" * 200000, "null", "NaN", "7"]))
)
_on_header(
    "a manifest of a later format",
    _manifest(lambda data, dice: data | {"format": dice.choice([0, 3, 99, -1, "2", None, 2.0, True])}),
)


# ---- plans and recipes ----------------------------------------------------------------------------------------------


def _as_data(data: bytes) -> Any:
    return yaml.load(data.decode(), Loader=yaml.BaseLoader) if not data.startswith(b"{") else json.loads(data)


def _dumped(data: Any) -> bytes:
    return json.dumps(data).encode()  # every JSON is YAML


TEXTS["a field changed"] = lambda data, dice, other: _dumped(spoil(_as_data(data), dice))
TEXTS["several fields changed"] = lambda data, dice, other: _dumped(spoil(_as_data(data), dice, dice.randint(2, 8)))


@into(TEXTS, "lines exchanged or twice")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    lines = data.splitlines(keepends=True)
    for _ in range(dice.randint(1, 3)):
        i = dice.randrange(len(lines))
        lines.insert(dice.randrange(len(lines)), lines[i] if dice.random() < 0.5 else lines.pop(i))
    return b"".join(lines)


TAGS = (
    "!!python/object/apply:os.system ['touch MARKER']",
    "!!python/object/new:subprocess.Popen [['touch', 'MARKER']]",
    "!!python/name:os.system",
    "!!python/module:hostile_payload",
    "!!python/object:hostile_payload.Evil {}",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2001-01-01",
    "!unknown x",
    "&a [*a]",
    "*nowhere",
    "<<: {a: 1}",
    "{[1]: 2}",
    "? {a: b} : c",
    ".nan",
    "0x" + "f" * 5000,
    "1" * 5000,
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "'\\x1b[31m'",
    "'[bold]x[/red]'",
    "\x00",
    "\ufeff",
    "\u2028",
    "|\n" + " " * 5000 + "x",
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@into(TEXTS, "a tag, an alias or depth")
def _(data: bytes, dice: random.Random, other: Callable[[], bytes]) -> bytes:
    lines = data.decode().splitlines()
    i = dice.randrange(len(lines))
    key, colon, _ = lines[i].partition(":")
    lines[i] = f"{key}{colon or ':'} {dice.choice(TAGS)}"
    return "\n".join(lines).encode()


TEXTS["aliases that multiply"] = lambda data, dice, other: (
    BOMB + data.decode() + f"\nextra: *a{dice.randint(1, 9)}\n"
).encode()
TEXTS["other bytes"] = lambda data, dice, other: (
    data.decode().encode(dice.choice(("utf-16", "utf-32", "utf-7"))) if dice.random() < 0.6 else dice.randbytes(2000)
)
TEXTS["very deep"] = lambda data, dice, other: dice.choice(
    [b"[" * 100000, b"{a: " * 50000, b"- " * 50000, b"&a [*a]", b'{"a":' * 50000]
)
TEXTS["empty or nothing of it"] = lambda data, dice, other: dice.choice(
    (b"", b"\n", b"---\n", b"null", b"[]", b"7", b"surgeon: 1", b"surgeon-plan: 2", b"---\n---\n", b"%YAML 9.9\n---\na")
)


def kinds(name: str) -> dict[str, Damage]:
    """Give the ways to damage a file, by its suffix."""
    if name.endswith((".yaml", ".json")):
        return BYTES | TEXTS
    if name.endswith(".safetensors"):
        return BYTES | HEADERS
    return BYTES | ({} if "legacy" in name else ZIPS)
