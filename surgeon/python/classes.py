"""Modules with code of their own → Python classes; those that differ in numbers alone share one.

Where such numbers differ, they are arguments of the class. Those that are equal in every module, such as the channels
that one conv gives and the next one takes, are one argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgeon.python import literals
from surgeon.python.layers import REQUIRED, Argument, same
from surgeon.python.layout import Bracket, Code, call, lines
from surgeon.python.parts import Container, Layer, Own, Part, Stored

_MOST_POSITIONAL = 3


@dataclass(slots=True)
class Written:
    """A Python class: its name, its arguments with their types and defaults, and its lines."""

    name: str
    arguments: list[Argument] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A value in the `__init__` of a class: what it is called, and its values in all modules of the class."""

    hint: str
    place: str
    default: Any
    values: tuple[Any, ...]


def written(root: Own) -> list[Written]:
    """Write the classes of a network, each behind those that it uses."""
    groups: dict[Any, list[Own]] = {}
    for one in sorted(_owns(root), key=lambda own: own.height):
        groups.setdefault(one.key, []).append(one)
    names, classes = _names(list(groups.values())), dict[Any, Written]()
    for key, members in groups.items():
        classes[key] = Written(names[key])
        _Writer(classes[key], members, classes).write()
    return list(classes.values())


def _owns(part: Part) -> Iterator[Own]:
    if isinstance(part, Layer):
        return
    for child in part.children.values():
        yield from _owns(child)
    if isinstance(part, Own):
        yield part


def _names(groups: Sequence[list[Own]]) -> dict[Any, str]:
    """Name the classes; where several have one name, by the children that only one of them has."""
    names: dict[Any, str] = {}
    taken = set(literals.RESERVED)
    by_name: dict[str, list[Own]] = {}
    for group in groups:
        by_name.setdefault(group[0].name, []).append(group[0])
    for name, alike in by_name.items():
        common = set.intersection(*({*one.children} for one in alike))
        for one in alike:
            extra = [child for child in one.children if child not in common and literals.is_name(child)]
            words = "".join(child.title().replace("_", "") for child in extra) if len(extra) == 1 else ""
            made = literals.as_name(f"{name}With{words}" if words else name, "Module", taken, link="")
            names[one.key] = made
            taken.add(made)
    return names


class _Writer:
    """Writes one class, whose modules are `members`."""

    def __init__(self, made: Written, members: list[Own], classes: dict[Any, Written]) -> None:
        self.made, self.members, self.classes = made, members, classes
        self.arguments: dict[tuple[str, ...], str] = {}  # values in all members → the argument
        self.taken = set(literals.RESERVED)
        self.defaults: dict[str, Any] = {}

    def write(self) -> None:
        first = self.members[0]
        body: list[str] = []
        if first.children or first.tensors:
            self._choose_arguments()
            body += self._begin()
            for stored in first.tensors:
                body += self._tensor(stored)
            for name in first.children:
                body += self._child(name)
        self.made.lines = [f"class {self.made.name}(nn.Module):", *self._annotations(), *body]
        if first.forward is not None:
            self.made.lines += [*([""] if body else []), *_signature(first.forward.parameters, first.forward.returns)]
            self.made.lines += first.forward.lines
        elif not body:
            self.made.lines += ["    pass"]

    def _annotations(self) -> list[str]:
        named = [one.name for one in self.members[0].tensors if not one.is_parameter and literals.is_name(one.name)]
        return [*(f"    {name}: Tensor" for name in named), ""] if named else []

    def _choose_arguments(self) -> None:
        found: dict[tuple[str, ...], list[_Slot]] = {}
        for slot in self._slots():
            if not all(same(value, slot.values[0]) for value in slot.values):
                found.setdefault(tuple(map(repr, slot.values)), []).append(slot)
        for key, slots in found.items():
            name = _common_name(slots)
            if name in self.taken:
                name = f"{slots[0].place}_{name}"
            name = literals.as_name(name, "n", self.taken)
            self.taken.add(name)
            self.arguments[key] = name
            for member, value in zip(self.members, slots[0].values, strict=True):
                member.values[name] = value
            default = slots[0].default
            is_usual = any(same(value, default) for value in slots[0].values)
            self.made.arguments.append(Argument(name, slots[0].values[0], default if is_usual else REQUIRED))
        self.made.arguments.sort(key=lambda one: not one.is_required)

    def _slots(self) -> Iterator[_Slot]:
        first = self.members[0]
        for at, stored in enumerate(first.tensors):
            for i in range(len(stored.shape)):
                hint = f"{stored.name}_size" if len(stored.shape) == 1 else f"{stored.name}_size_{i}"
                values = tuple(one.tensors[at].shape[i] for one in self.members)
                yield _Slot(hint, stored.name, REQUIRED, values)
        for name in first.children:
            yield from self._slots_of(name, [one.children[name] for one in self.members])

    def _slots_of(self, place: str, parts: list[Part]) -> Iterator[_Slot]:
        first = parts[0]
        if isinstance(first, Layer):
            for at, one in enumerate(first.arguments):
                values = tuple(part.arguments[at].value for part in parts if isinstance(part, Layer))
                yield _Slot(one.name, place, one.default, values)
        elif isinstance(first, Container):
            for name in first.children:
                below = [part.children[name] for part in parts if isinstance(part, Container)]
                yield from self._slots_of(f"{place}_{name}", below)
        else:
            for argument in self.classes[first.key].arguments:
                values = tuple(part.values[argument.name] for part in parts if isinstance(part, Own))
                yield _Slot(argument.name, place, argument.default, values)

    def _begin(self) -> list[str]:
        items = []
        for one in self.made.arguments:
            kinds = sorted({_kind(member.values[one.name]) for member in self.members})
            default = "" if one.is_required else f" = {literals.text(one.default)}"
            items.append(f"{one.name}: {' | '.join(kinds)}{default}")
        return [*_definition("__init__", items, "None"), "        super().__init__()"]

    def _value(self, values: list[Any]) -> Code:
        """Write a value: the argument, where it differs from module to module."""
        if all(same(value, values[0]) for value in values):
            return literals.text(values[0])
        return self.arguments[tuple(map(repr, values))]

    def _tensor(self, stored: Stored) -> list[str]:
        at = self.members[0].tensors.index(stored)
        shapes = [one.tensors[at].shape for one in self.members]
        sides: list[Code] = [self._value([shape[i] for shape in shapes]) for i in range(len(stored.shape))]
        is_plain = str(stored.dtype) in ("torch.float32", "torch.float16", "torch.bfloat16")
        empty = call("torch.empty", sides or ["()"], [] if is_plain else [("dtype", str(stored.dtype))])
        name = literals.string(stored.name)
        if not stored.is_parameter:
            return lines("", call("self.register_buffer", [name, empty]), indent=8)
        is_trained = stored.dtype.is_floating_point or stored.dtype.is_complex
        made = call("nn.Parameter", [empty], [] if is_trained else [("requires_grad", "False")])
        if literals.is_name(stored.name):
            return lines(f"self.{stored.name} = ", made, indent=8)
        return lines("", call("self.register_parameter", [name, made]), indent=8)

    def _child(self, name: str) -> list[str]:
        made = self._made([one.children[name] for one in self.members])
        if literals.is_name(name):
            return lines(f"self.{name} = ", made, indent=8)
        return lines("", call("self.add_module", [literals.string(name), made]), indent=8)

    def _made(self, parts: list[Part]) -> Code:
        """Write what makes a part."""
        first = parts[0]
        if isinstance(first, Container):
            return self._container(first, parts)
        if isinstance(first, Layer):
            arguments = list(first.arguments)
            rows = [[one.value for one in part.arguments] for part in parts if isinstance(part, Layer)]
            columns = [list(column) for column in zip(*rows, strict=True)]
            return self._call(first.kind, arguments, columns)
        whole = self.classes[first.key]
        columns = [[part.values[one.name] for part in parts if isinstance(part, Own)] for one in whole.arguments]
        return self._call(whole.name, whole.arguments, columns)

    def _call(self, kind: str, arguments: list[Argument], columns: list[list[Any]]) -> Code:
        """Write the call of a class: what is required by position, if that is little, the rest by name."""
        args, named = list[Code](), list[tuple[str, Code]]()
        by_position = kind.startswith("nn.") or sum(one.is_required for one in arguments) <= _MOST_POSITIONAL
        for one, values in zip(arguments, columns, strict=True):
            if one.is_required and by_position:
                args.append(self._value(values))
            elif one.is_required or not all(same(value, one.default) for value in values):
                named.append((one.name, self._value(values)))
        return call(kind, args, named)

    def _container(self, first: Container, parts: list[Part]) -> Code:
        below = {
            name: self._made([part.children[name] for part in parts if isinstance(part, Container)])
            for name in first.children
        }
        if first.kind == "nn.ModuleDict":
            items = tuple((f"{literals.string(name)}: ", made) for name, made in below.items())
            return call(first.kind, [Bracket("{", items, "}")])
        if not first.is_numbered:
            pairs = [Bracket("(", (("", literals.string(name)), ("", made)), ")") for name, made in below.items()]
            return call(first.kind, [call("OrderedDict", [Bracket("[", tuple(("", one) for one in pairs), "]")])])
        if first.kind == "nn.ModuleList":
            return call(first.kind, [Bracket("[", tuple(("", made) for made in below.values()), "]")])
        return call(first.kind, list(below.values()))


def _common_name(slots: Sequence[_Slot]) -> str:
    """Name what several layers share: what goes in and comes out of convs is `channels`."""
    hints = {slot.hint for slot in slots}
    return next((name for name in ("channels", "features") if {f"in_{name}", f"out_{name}"} <= hints), slots[0].hint)


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"tuple[{', '.join(map(_kind, value))}]"
    return "None" if value is None else type(value).__name__


def _definition(name: str, items: Sequence[str], returns: str) -> list[str]:
    begin = Bracket(f"def {name}(", tuple(("", one) for one in ("self", *items)), ")")
    return lines("", begin, f" -> {returns}:", indent=4)


def _signature(parameters: Sequence[tuple[str, str]], returns: str) -> list[str]:
    return _definition("forward", [f"{name}: {kind}" for name, kind in parameters], returns)
