"""Follow the program of a pickle without executing it, and say what it does that no file of `torch.save` does.

A pickle is a program of a stack machine. An honest one makes its modules blank, fills each one once, hides none of
their methods, changes nothing that a module has looked through while it was filled, calls only what `calls` lists,
makes no tensor that is larger than its storage, and holds no class that could be dangerous to call. So nothing else is
allowed.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from torch import nn

from surgeon.blocks import sum_of_convs
from surgeon.files import arrays, calls, functions
from surgeon.files.names import HARMLESS, STORED, Trust, lies_in
from surgeon.files.plain import is_named_tuple, keeps_hash, slots_of
from surgeon.files.values import UNKNOWN, Value, bytes_per_number, excess

Lengths = Callable[[str, int], int | None]  # key and claimed bytes of a storage → the bytes that the file has for it
UNKNOWN_GRAPH = "holds a GraphModule that is none of surgeon's"
_CHANGING = ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS")  # these change what they take, and leave it


class Program:
    """One pickle: its steps, and the names in it."""

    def __init__(self, source: bytes | IO[bytes]) -> None:
        self.steps = [(opcode, _named(opcode.name, argument)) for opcode, argument, _ in pickletools.genops(source)]

    @property
    def names(self) -> frozenset[str]:
        """All names in it, as torch reads them: Python 2 called some of them differently."""
        return frozenset(argument for opcode, argument in self.steps if opcode.name == "GLOBAL")

    def objection(self, admitted: Mapping[str, object], trust: Trust, lengths: Lengths) -> str | None:
        """Say what it does that no honest file does; `admitted` is what its names stand for, beyond torch's own."""
        walk = _Walk(admitted, trust, lengths)
        return walk.objection(self.steps)


def _named(opcode: str, argument: Any) -> Any:
    """Give the argument of a GLOBAL as one dotted name of Python 3, and any other as it is."""
    if opcode != "GLOBAL":
        return argument
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


class _Walk:
    """The stack and the memo of the machine, on paper."""

    def __init__(self, admitted: Mapping[str, object], trust: Trust, lengths: Lengths) -> None:
        self.admitted, self.trust, self.lengths = admitted, trust, lengths
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Value] = {}

    def objection(self, steps: Iterable[tuple[pickletools.OpcodeInfo, Any]]) -> str | None:
        for count, (opcode, argument) in enumerate(steps, 1):
            if opcode.name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif opcode.name == "MARK":
                self.marks.append(len(self.stack))
            elif opcode.name == "STOP":
                return excess(self.stack[-1], count)
            elif culprit := self._step(opcode, argument):
                return culprit
        return None

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> str | None:
        taken = self._take(opcode)
        if culprit := self._objection(opcode.name, taken):
            return culprit
        if opcode.name in _CHANGING:
            if taken[0].is_checked:
                return "changes an object that a module's __setstate__ has already checked"
            if taken[0].opcode not in ("EMPTY_LIST", "EMPTY_DICT", "REDUCE", "NEWOBJ"):
                return "changes what cannot be changed"
            taken[0].parts += taken[1:]
            self.stack.append(taken[0])
        elif opcode.name == "BINPERSID":
            length = self._length(taken[0])
            if length is None:
                return "names a storage that it does not hold, or one of another size"
            self.stack.append(Value(opcode.name, length, taken))
        elif opcode.stack_after:
            self.stack.append(Value(opcode.name, argument, taken))
        return None

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[Value]:
        """Pop what the opcode pops, in the order in which it was pushed, without the mark."""
        count, items = len(opcode.stack_before), []
        if pickletools.stackslice in opcode.stack_before:
            mark = self.marks.pop()
            items = self.stack[mark:]
            del self.stack[mark:]
            count -= 2
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("a step takes what is not there")
        first = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return first + items

    def _length(self, pid: Value) -> int | None:
        """Say how many bytes a storage has, if the file holds as many: ('storage', kind, key, device, count, …)."""
        parts = pid.parts if pid.is_tuple and len(pid.parts) in (5, 6) else [pid] * 5
        what, key, device, count = (parts[i].literal for i in (0, 2, 3, 4))
        width = bytes_per_number(parts[1].name)
        if what != "storage" or not isinstance(key, str) or not isinstance(device, str) or width is None:
            return None
        held = self.lengths(key, count * width) if type(count) is int and count >= 0 else None
        if held is None or held // width != count:
            return None
        return held if len(parts) == 5 or parts[5].opcode == "NONE" else _length_of_view(parts[5], count, width)

    def _objection(self, opcode: str, taken: Sequence[Value]) -> str | None:
        """Say what is wrong with one step of the program; `taken` is what it pops."""
        for value in taken[1:] if opcode in ("REDUCE", "NEWOBJ") else taken:
            kind = self.admitted.get(value.name)
            if value.name == functions.GETATTR:
                return "stores builtins.getattr"
            if value.name == sum_of_convs.REDUCE:
                return UNKNOWN_GRAPH
            if isinstance(kind, type) and issubclass(kind, nn.Module) and not _may_be_stored(value.name, self.trust):
                return f"stores the class {value.name}, which another module could call with arguments from the file"
        if opcode == "REDUCE":
            return self._objection_to_call(taken[0], taken[1])
        if opcode == "NEWOBJ":
            return self._objection_to_blank(taken[0], taken[1])
        if opcode == "BUILD":
            return self._objection_to_filling(taken[0], taken[1])
        if opcode in ("APPEND", "APPENDS") and taken[0].opcode != "EMPTY_LIST":
            return "appends to what is no list"
        if opcode in ("SETITEM", "SETITEMS"):
            is_dict = taken[0].opcode == "EMPTY_DICT" or taken[0].made_by.startswith("collections.")
            return self._objection_to_keys(taken[1::2]) if is_dict else "sets an item of what is no dict"
        return None

    def _objection_to_call(self, called: Value, arguments: Value) -> str | None:
        kind = self.admitted.get(called.name)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            is_value = len(arguments.parts) == 1 and arguments.parts[0].literal is not UNKNOWN
            return None if arguments.is_tuple and is_value else f"calls {called.name} with more than a value"
        if not calls.is_listed(called.name):
            return f"calls {called.name or 'what it has made'}"
        if not calls.is_allowed(called.name, arguments):
            if called.name == sum_of_convs.REDUCE:
                return UNKNOWN_GRAPH
            return f"calls {called.name} with {self._found_in(arguments)}"
        if called.name == "functools.partial" and not self._may_be_called(arguments.parts[0]):
            return f"calls {called.name} with {arguments.parts[0].name}"
        if called.name in ("builtins.set", "builtins.frozenset") and arguments.parts:
            return self._objection_to_keys(arguments.parts[0].parts)
        if called.name == sum_of_convs.REDUCE:
            arguments.check_()
        return None

    def _found_in(self, arguments: Value) -> str:
        """Name what a call that is not allowed would be given, if it has a name."""
        names = [value.name for value in arguments.all_parts() if value.name in self.admitted]
        return names[0] if names else "arguments that torch.save does not write"

    def _may_be_called(self, value: Value) -> bool:
        """Whether a function or class may wait in a partial for a forward to call it."""
        if value.made_by == functions.GETATTR:  # it has been looked at, and is one of torch's
            return True
        kind = self.admitted.get(value.name)
        return kind is not None and callable(kind) and value.name not in ("functools.partial", "pathlib.PosixPath")

    def _objection_to_blank(self, called: Value, arguments: Value) -> str | None:
        kind = self.admitted.get(called.name)
        if not isinstance(kind, type) or issubclass(kind, enum.Enum) or called.name in functions.STANDARD:
            return f"calls {called.name or 'what it has made'}"
        count = len(arguments.parts) if arguments.is_tuple else -1
        if is_named_tuple(kind):
            return None if count == len(getattr(kind, "_fields", ())) else f"makes a {kind.__name__} of other fields"
        return None if count == 0 else f"calls {called.name} with arguments"

    def _objection_to_keys(self, keys: Iterable[Value]) -> str | None:
        """Refuse keys whose classes have a hash of their own, which would run."""
        for key in keys:
            for value in key.all_parts() if key.is_tuple and len(key.parts) < 100 else (key,):
                kind = self.admitted.get(value.made_by)
                if isinstance(kind, type) and value.made_by not in HARMLESS and not keeps_hash(kind):
                    return f"uses a {kind.__name__} as a key, whose own __hash__ would run"
        return None

    def _objection_to_filling(self, target: Value, state: Value) -> str | None:
        if target.is_filled:
            return "sets the state of an object twice, and so could call what it stored first"
        target.is_filled = True
        if arrays.is_ours(target):
            return arrays.objection(target, state)
        kind = self.admitted.get(target.made_by)
        if target.opcode == "REDUCE" and target.made_by != calls.BLANK:
            return self._objection_to_filling_result(target, state)
        if target.opcode not in ("NEWOBJ", "REDUCE") or not isinstance(kind, type):
            return "sets the state of what has none"
        if not issubclass(kind, nn.Module):
            return _objection_to_data(kind, state, target.made_by in HARMLESS)
        if state.opcode != "EMPTY_DICT":
            return f"sets the state of a {kind.__name__} from something other than a dict"
        if kind.__setstate__ is not nn.Module.__setstate__:
            state.check_()
        return _hidden(kind, state)

    def _objection_to_filling_result(self, target: Value, state: Value) -> str | None:
        """Judge the state of what a call has made."""
        name = target.made_by
        if name == "collections.OrderedDict":
            return None if calls.has_new_attributes(state, OrderedDict) else "hides a method of a dict"
        if name == "types.SimpleNamespace" and state.opcode == "EMPTY_DICT":
            return None
        if name == "functools.partial" and state.is_tuple and len(state.parts) == 4:
            function, args, kwargs, attributes = state.parts
            is_same = function is target.parts[1].parts[0] and args.is_tuple and kwargs.opcode == "EMPTY_DICT"
            if is_same and attributes.opcode == "NONE":
                return None
        return f"sets the state of a {name} to what it cannot be"


def _length_of_view(view: Value, count: int, width: int) -> int | None:
    """Say how many bytes a part of a storage has: (key, offset, count), which torch < 1.6 wrote."""
    _, offset, size = view.literal if view.is_tuple and len(view.parts) == 3 else (None, None, None)
    if type(offset) is not int or type(size) is not int or min(offset, size) < 0:
        return None
    return size * width if offset + size <= count else None


def _may_be_stored(name: str, trust: Trust) -> bool:
    """Whether a module may hold this class as a value, such as the kind of its norms."""
    return name in STORED or lies_in(name, ("torch.nn", *trust.allow))


def _objection_to_data(kind: type, state: Value, is_harmless: bool) -> str | None:
    """Judge the state of an object that is no module."""
    if is_harmless:  # it was looked at
        return None
    if state.is_tuple and len(state.parts) == 2 and getattr(kind, "__setattr__", None) == object.__setattr__:
        attributes, slots = state.parts
        names = [key.literal for key in slots.parts[::2]] if slots.opcode == "EMPTY_DICT" else [UNKNOWN]
        if attributes.opcode not in ("NONE", "EMPTY_DICT") or not set(names) <= slots_of(kind):
            return f"sets more than the slots of a {kind.__name__}"
        return _hidden(kind, attributes)
    if dataclasses.is_dataclass(kind) and hasattr(kind, "__setstate__"):  # what dataclass(slots=True) makes
        return None if state.opcode == "EMPTY_LIST" else f"sets the state of a {kind.__name__} from no list"
    if state.opcode != "EMPTY_DICT":
        return f"sets the state of a {kind.__name__} from something other than a dict"
    return _hidden(kind, state)


def _hidden(kind: type, state: Value) -> str | None:
    """Name a method that an attribute would hide."""
    fields = getattr(kind, "__dataclass_fields__", {})
    for key in state.parts[::2]:
        name = key.literal
        if not isinstance(name, str):
            return f"hides {kind.__name__}.{None if name is UNKNOWN else name} behind an attribute"
        if name not in fields and inspect.isroutine(getattr(kind, name, None)):
            return f"hides {kind.__name__}.{name} behind an attribute"
    return None
