"""YAML text → plain data and the place of every key and value, so that an error can say where it is.

Scalars are those of YAML 1.2: `no` and `12:30` are text, `012` is 12, `1e-3` is a number. What would be
surprising is refused: duplicate keys, merge keys, tags, several documents, aliases that contain themselves or multiply.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from surgeon.errors import Fault, RecipeError

Path = tuple[str | int, ...]
_MOST_COPIES = 10_000  # values that aliases may add to what is written out
_DEEPEST = 50  # levels of lists and mappings
_TAG = "tag:yaml.org,2002:"
_SCALARS: list[tuple[str, str, str, Callable[[str], object]]] = [  # kind, how it is written, first letters, its value
    ("null", r"~|null|Null|NULL|", "~nN", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+", "-+0123456789", int),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        "-+.0123456789",
        lambda text: _finite(float(text)),
    ),
]
_VALUE_OF = {_TAG + kind: value for kind, _, _, value in _SCALARS}


class Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does; only ever used to compose nodes, never to construct objects."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """Puts in quotes what `Loader` would not read as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _kind, _pattern, _letters, _ in _SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"({_pattern})$"), [*_letters, ""])


class Place(NamedTuple):
    """Where something stands. Places sort in file order, options of the command line last."""

    line: int
    column: int
    where: str


@dataclass(slots=True)
class Marked:
    """What a YAML text says, where it says it, and what is wrong with it as YAML."""

    data: Any = None
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    faults: list[tuple[Place, Fault]] = field(default_factory=list)


class _ReadError(Exception):
    """An error after which nothing more can be read."""

    def __init__(self, place: Place, what: str) -> None:
        super().__init__(what)
        self.fault = (place, Fault(place.where, "", what))


def read(text: str, name: str, *, todo: str = "") -> Marked:
    """Read a text that holds one mapping; `name` stands in the positions, which are empty without one.

    >>> marked = read("rules: [{swap: acblock}]", "a.yaml")
    >>> marked.data, marked.values["rules", 0, "swap"].where
    ({'rules': [{'swap': 'acblock'}]}, 'a.yaml:1:16')

    Raises:
        RecipeError: the text is no YAML, or no mapping. Lesser errors wait in `Marked.faults` for `validate`.
    """
    marked = Marked()
    walk = _Walk(marked, lambda line, column: Place(line, column, f"{name}:{line}:{column}" if name else ""))
    try:
        marked.data = walk.read(text, ())
        if not isinstance(marked.data, dict):
            raise _ReadError(marked.values[()], f"a mapping (key: value) is needed, not {quoted(marked.data)}")
    except _ReadError as error:
        raise RecipeError([error.fault[1]], todo=todo) from error
    return marked


def override_(marked: Marked, setting: str) -> None:
    """Set one value, as `rules[1].with.alpha=0.25`; mappings on the way are made where they are missing."""
    target, equals, text = (part.strip() for part in setting.partition("="))
    place = Place(sys.maxsize, 0, f"--set {target}")
    try:
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[[0-9]{1,9}\])*", target):
            raise _ReadError(place, "an override is written rules[0].with.key=value")
        path = tuple(int(index) if index else key for index, key in re.findall(r"\[([0-9]+)\]|([\w-]+)", target))
        holder = _holder_of(path, marked, place)
        for places in (marked.values, marked.keys):
            for old in [p for p in places if p[: len(path)] == path]:
                del places[old]
            places[path] = place
        holder[path[-1]] = _Walk(marked, lambda line, column: place).read(text or "null", path)
    except _ReadError as error:
        marked.faults.append(error.fault)


def dump(data: Any) -> str:
    r"""Write plain data as YAML that `read` reads back as it was.

    >>> dump({"a": ["no", "012", 1e-3]})
    "a:\n- no\n- '012'\n- 0.001\n"
    """
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110))


def quoted(value: object) -> str:
    """Write a value as its author would recognise it: short, and in the language of the file.

    >>> [quoted(value) for value in (None, True, "1.5", 1.5, [1], {})]
    ['null', 'true', "'1.5'", '1.5', 'a list', 'a mapping']
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    return reprlib.repr(value) if isinstance(value, str | int | float) else "a list"


def path_text(path: Path) -> str:
    """Write a path as in messages and settings.

    >>> path_text(("rules", 2, "with", "alpha"))
    'rules[2].with.alpha'
    """
    words = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(words).removeprefix(".")


def in_file_order(faults: Iterable[tuple[Place, Fault]]) -> list[Fault]:
    """Sort errors by where they stand."""
    return [fault for _, fault in sorted(faults, key=lambda placed: placed[0])]


class _Walk:
    """Turns one YAML document into data, and notes where everything stands."""

    def __init__(self, marked: Marked, place: Callable[[int, int], Place]) -> None:
        self.marked = marked
        self.place = place
        self.seen: set[int] = set()
        self.open: set[int] = set()
        self.copies = 0

    def read(self, text: str, path: Path) -> Any:
        """Read the one document of a text; `path` is where it belongs in the data."""
        try:
            self.loader = Loader(text)
            if (node := self.loader.get_single_node()) is None:
                raise _ReadError(self.place(1, 1), "nothing is written here")
            return self._data(node, path)
        except yaml.reader.ReaderError as error:
            before = text[: error.position].splitlines() or [""]
            what = f"the character U+{error.character:04X} is not allowed in YAML"
            raise _ReadError(self.place(len(before), len(before[-1]) + 1), what) from error
        except yaml.MarkedYAMLError as error:
            is_second = error.context == "expected a single document in the stream"
            what = "a second document starts here; only one is read" if is_second else f"not YAML: {error.problem}"
            raise _ReadError(self._at(error.problem_mark or self.loader.get_mark()), what) from error
        except (ValueError, OverflowError) as error:  # PyYAML on an escape such as "\UFFFFFFFF"
            raise _ReadError(self._at(self.loader.get_mark()), "not YAML: a number out of bounds") from error
        except RecursionError as error:
            raise _ReadError(self.place(1, 1), f"nested deeper than {_DEEPEST} levels") from error

    def _at(self, mark: yaml.Mark) -> Place:
        return self.place(mark.line + 1, mark.column + 1)

    def _fault(self, node: yaml.Node, path: Path, what: str) -> None:
        place = self._at(node.start_mark)
        self.marked.faults.append((place, Fault(place.where, path_text(path), what)))

    def _data(self, node: yaml.Node, path: Path) -> Any:
        place = self.marked.values[path] = self._at(node.start_mark)
        self.copies += id(node) in self.seen
        self.seen.add(id(node))
        if id(node) in self.open:
            raise _ReadError(place, "an alias that contains itself")
        if self.copies > _MOST_COPIES:
            raise _ReadError(place, f"aliases that unfold to more than {_MOST_COPIES:,} values")
        if len(self.open) > _DEEPEST:
            raise _ReadError(place, f"nested deeper than {_DEEPEST} levels")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._refuse_tag(node, path)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            data: Any = self._mapping(node, path)
        else:
            data = [self._data(item, (*path, i)) for i, item in enumerate(node.value)]
        self.open.remove(id(node))
        return data

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value  # always text, also where it looks like a number
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, path, "a key is a word, not a list or a mapping")
            elif key == "<<":
                self._fault(key_node, path, "merge keys (<<) are not read; write the keys out")
            elif key in data:
                self._fault(key_node, (*path, key), "this key is given twice")
            else:
                self.marked.keys[*path, key] = self._at(key_node.start_mark)
                data[key] = self._data(value_node, (*path, key))
        return data

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        self._refuse_tag(node, path)
        if re.search("[\ud800-\udfff]", node.value):
            self._fault(node, path, f"{quoted(node.value)} holds half a character")
            return ascii(node.value)
        try:
            return _VALUE_OF.get(node.tag, str)(node.value)
        except ValueError:  # a number beyond all bounds, or a tag that is refused
            return node.value

    def _refuse_tag(self, node: yaml.Node, path: Path) -> None:
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        expected = self.loader.resolve(type(node), node.value, (is_plain, False))  # type: ignore[no-untyped-call]
        if node.tag != expected:
            self._fault(
                node, path, f"the tag {node.tag.replace(_TAG, '!!')!a} is refused: only plain values are allowed"
            )


def _holder_of(path: Path, marked: Marked, place: Place) -> Any:
    """Find the list or mapping that holds, or will hold, what a path leads to."""
    at = marked.data
    for i, step in enumerate(path):
        if reason := _refusal(at, step):
            raise _ReadError(place, f"{path_text(path[:i])} {reason}")
        if i == len(path) - 1:
            break
        if isinstance(step, str) and at.get(step) is None and isinstance(path[i + 1], str):
            at[step] = {}
            marked.keys[path[: i + 1]] = marked.values[path[: i + 1]] = place
        at = at.get(step) if isinstance(step, str) else at[step]
    return at


def _refusal(holder: Any, step: str | int) -> str | None:
    """Say why a step leads nowhere, or None if it leads to a value or to a place for one."""
    if isinstance(step, int) and isinstance(holder, list):
        entries = "1 entry" if len(holder) == 1 else f"{len(holder)} entries"
        return f"has {entries}, counted from 0" if step >= len(holder) else None
    if isinstance(step, str) and isinstance(holder, dict):
        return None
    return f"is {quoted(holder)} and has no {path_text((step,))}"


def _finite(number: float) -> float:
    if math.isinf(number):
        raise ValueError
    return number
