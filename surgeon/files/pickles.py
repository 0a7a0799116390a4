"""Read what `torch.save` wrote without running it.

A pickle is a program: it may name any function of any installed package, and call it. torch's weights-only unpickler
runs that program with a list of names it may use. A whole `nn.Module` needs more names than tensors do, and which ones
depends on the file, so a file is read three times:

1. **Names.** torch lists them without unpickling. Every one must lie in an admitted package; only then is anything
   imported, and then each must be, whatever it calls itself, an `nn.Module` class of an admitted package. A block
   that an installed distribution offers (entry point `surgeon.blocks`) is admitted by itself, not its package.
2. **Calls.** The program is followed on paper. torch lets a file call whatever it may name, with arguments of the
   file's choice: `timm.task.distillation.DistillationTeacher` downloads what it is told to. But an honest file makes
   its modules blank, fills each one once, hides none of their methods, changes nothing that a module has looked through
   while it was filled, and holds no class that could be dangerous to call. So nothing else is allowed.
3. **Load.** `torch.load(weights_only=True)`, with exactly those names.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pickle
import pickletools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import torch.fx
from torch import nn

from surgeon import blocks
from surgeon._torch_compat import pickle_program
from surgeon.errors import ModelError
from surgeon.models.sandbox import unpickling
from surgeon.nn import MOVED, LaterFormatError, current_name

PACKAGES = ("torch.nn", "torchvision", "timm", "surgeon")

# Modules whose very state is a program. No flag but --unsafe-pickle admits them.
PROGRAMS = (torch.fx.GraphModule, torch.jit.ScriptModule)

# What whole models (119 of torchvision's and 1340 of timm's were measured) and checkpoints hold besides modules and
# tensors. A file may refer to these and make blank ones; it can call none of them but an Enum. Left out on purpose:
# `functools.partial`, which four ViTs hold, since a file could store a constructor in it with arguments of its choice,
# for a later forward to call; `builtins.getattr`, which six FasterNets need, since it reaches everything.
HARMLESS = frozenset(
    {
        "argparse.Namespace",  # the options of a training run
        "surgeon.nn.ConvSpec",
        "surgeon.nn.Pads",
        "timm.layers.activations.gelu",
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torch._C._nn.gelu",
        "torch.nn.functional.relu",
        "torch.nn.functional.silu",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
        "torchvision.ops.poolers.LevelMapper",  # a detector that has run once holds one
    }
)

# Classes of torchvision and timm that honest models hold as values, besides those of torch.nn (one model of each
# family was looked at). Any other could be a network that fetches what it is told to, put where a forward calls it.
STORED = frozenset({"timm.models.nextvit.NextConvBlock", "timm.models.nextvit.NextTransformerBlock"})


@dataclass(frozen=True, slots=True)
class Trust:
    """What a file may do: name the modules of more packages (`--allow`), or run as it likes (`--unsafe-pickle`)."""

    allow: tuple[str, ...] = ()
    unsafe_pickle: bool = False


def read(path: Path, trust: Trust) -> Any:
    """Unpickle the zip archive that `torch.save` wrote.

    Raises:
        ModelError: a name that is not admitted, a call that no honest file makes, a damaged file.
    """
    with path.open("rb") as file:
        if trust.unsafe_pickle:
            return _run(path, file)
        admitted = _admitted(path, _names(path, file), trust)
        names: list[Any] = [(found, name) for name, found in admitted.items()]
        try:
            culprit = _misuse(file, admitted, trust)
            if culprit is None:
                file.seek(0)
                with unpickling(names):
                    return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a __setstate__ makes of a state that another version wrote
            raise _unreadable(path, error) from error
    raise ModelError(
        f"{path} {culprit}, which no file written by torch.save does",
        todo="Do not trust it; ask whoever made it for the state_dict.",
    )


def read_legacy(path: Path, trust: Trust) -> Any:
    """Unpickle what torch < 1.6 wrote: tensors only, for torch cannot list the names in such a file."""
    with path.open("rb") as file:
        if trust.unsafe_pickle:
            return _run(path, file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelError(
                f"{path} was saved by torch < 1.6, or in its format, and holds more than tensors",
                todo="Load it once where you trust it, and save it again with torch.save.",
            ) from error


def lies_in(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is below one of the packages; whole names, so `timmy.net` is not in `timm`."""
    return any(name.startswith(f"{package}.") for package in packages)


def offered_blocks() -> dict[str, type[nn.Module]]:
    """Give the blocks that other distributions offer, by the names that files have for them."""
    named = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in blocks.registry().values()}
    return {name: kind for name, kind in named.items() if not lies_in(name, PACKAGES)}


@contextmanager
def on_path(folder: Path, *, first: bool) -> Iterator[None]:
    """Let modules in `folder` be imported: before all others, as `python -m` does, or only where no other answers."""
    entry = str(folder.resolve())
    sys.path.insert(0 if first else len(sys.path), entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _run(path: Path, file: IO[bytes]) -> Any:
    try:
        with on_path(Path.cwd(), first=False):
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_Unchecked)
    except Exception as error:
        raise _unreadable(path, error) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if moved := MOVED.get(f"{module}.{name}"):
            module, _, name = moved.rpartition(".")
        return super().find_class(module, name)


class _Unchecked:
    """Stands in for the module `pickle`, which torch asks for; it knows where our classes have moved."""

    Unpickler = _Unpickler
    load, loads, __name__ = staticmethod(pickle.load), staticmethod(pickle.loads), "pickle"


def _unreadable(path: Path, error: Exception) -> ModelError:
    why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, LaterFormatError):
        return ModelError(
            f"{path} was written by a later version of surgeon: {why}", todo="Upgrade: pip install -U conv-surgeon."
        )
    if isinstance(error, KeyError):
        why = f"{why} is missing in it"
    return ModelError(
        f"{path} cannot be unpickled: {why}",
        todo="It is damaged, or its classes have changed; save its state_dict where it still loads, and use --arch.",
    )


def _names(path: Path, file: IO[bytes]) -> list[str]:
    """List what the pickle names beyond torch's own tensors and containers."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception as error:  # a truncated archive, an opcode that torch.save does not write
        raise _unreadable(path, error) from error


def _admitted(path: Path, names: Sequence[str], trust: Trust) -> dict[str, object]:
    """Find what the names stand for. Nothing is imported unless every name may be."""
    packages = (*PACKAGES, *trust.allow)
    refused = {name: why for name in names if (why := _refusal(name, packages))}
    found: dict[str, object] = {}
    for name in () if refused else names:
        try:
            found[name] = _find(name, packages)
        except _RefusedError as error:
            refused[name] = str(error)
    if refused:
        reasons = sorted(set(refused.values()))
        listed = [", ".join(n for n in refused if refused[n] == why) + f" ({why})" for why in reasons]
        problem = f"{path} holds names that may not be loaded: {'; '.join(listed)}"
        raise ModelError(problem, todo=_way_out(refused), refused=tuple(refused))
    return found


def _refusal(name: str, packages: Sequence[str]) -> str | None:
    """Say why a name may not even be looked up."""
    if (name := current_name(name)) in HARMLESS:
        return None
    if name.startswith("__main__."):
        return "defined in a script"
    if name.startswith(("torch.fx.", "torch.jit.")):
        return "a program that runs when it is opened"
    is_plain = all(part.isidentifier() and not part.startswith("__") for part in name.split("."))
    if is_plain and (lies_in(name, packages) or name in offered_blocks()):
        return None
    return "outside the admitted packages"


class _RefusedError(Exception):
    """Why a name that was looked up is not admitted."""


def _find(name: str, packages: Sequence[str]) -> object:
    """Import what the name stands for, and judge that, not the name."""
    name = current_name(name)
    where, _, attribute = name.rpartition(".")
    try:
        # No name of torch, torchvision, timm or surgeon may come from the current folder.
        with on_path(Path.cwd(), first=False) if not lies_in(name, PACKAGES) else nullcontext():
            found = getattr(importlib.import_module(where), attribute)
    except ModuleNotFoundError as error:
        raise _RefusedError(f"there is no module {error.name} here") from error
    except Exception as error:  # importing runs the package; what it raises is its own affair
        raise _RefusedError(f"not in the version installed here: {error}") from error
    if name in HARMLESS or (not lies_in(name, packages) and offered_blocks().get(name) is found):
        return found
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _RefusedError("not an nn.Module class")
    if issubclass(found, PROGRAMS):
        raise _RefusedError("a program that runs when it is opened")
    if not lies_in(f"{found.__module__}.{found.__qualname__}", packages):
        raise _RefusedError(f"really {found.__module__}.{found.__qualname__}, outside the admitted packages")
    return found


def _way_out(refused: Mapping[str, str]) -> str:
    """Say what the user can do about refused names."""
    scripted = [name.rpartition(".")[2] for name, why in refused.items() if why == "defined in a script"]
    if scripted:
        return f"Save its state_dict, and say where the class is: --arch file.py:{scripted[0]}"
    if "a program that runs when it is opened" in refused.values():
        return "Save the module that it was made from, or its state_dict and use --arch."
    packages = {".".join(name.split(".")[: 2 if name.startswith("torch.") else 1]) for name in refused}
    hopeless = {"numpy", *sys.builtin_module_names, *sys.stdlib_module_names}
    if set(refused.values()) == {"outside the admitted packages"} and not packages & hopeless:
        return f"If you trust that code, admit its modules: {' '.join(f'--allow {name}' for name in sorted(packages))}"
    return "Save its state_dict where you trust it, and use --arch; --unsafe-pickle would run any code in the file."


@dataclass(eq=False, slots=True)
class _Value:
    """Something on the unpickler's stack: the opcode that put it there, with which argument, and what went into it."""

    opcode: str
    argument: Any = None
    parts: list[_Value] = field(default_factory=list)
    is_filled: bool = False
    is_checked: bool = False  # a __setstate__ has looked at it

    @property
    def name(self) -> str:
        return str(self.argument).replace(" ", ".") if self.opcode == "GLOBAL" else ""

    def all_parts(self) -> Iterator[_Value]:
        """Walk over this value and all that went into it; containers may hold themselves."""
        seen, waiting = {id(self)}, [self]
        while waiting:
            value = waiting.pop()
            yield value
            waiting += [part for part in value.parts if id(part) not in seen]
            seen.update(map(id, value.parts))


def _misuse(file: IO[bytes], admitted: Mapping[str, object], trust: Trust) -> str | None:
    """Follow the pickle without executing it, and say what it does that would run code of the admitted names."""
    file.seek(0)
    program = pickle_program(file)
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken = _take(stack, opcode)
            if culprit := _objection(opcode.name, taken, admitted, trust):
                return culprit
            if opcode.name in ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"):  # these change what they take
                if taken[0].is_checked:
                    return "changes an object that a module's __setstate__ has already checked"
                taken[0].parts += taken[1:]
                stack.append(taken[0])
            elif opcode.stack_after:
                stack.append(_Value(opcode.name, argument, taken))
    return None


def _take(stack: list[_Value], opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Pop what the opcode pops, in the order in which it was pushed, without the mark."""
    count, items = len(opcode.stack_before), []
    if pickletools.stackslice in opcode.stack_before:
        mark = max(i for i, value in enumerate(stack) if value.opcode == "MARK")
        items = stack[mark + 1 :]
        del stack[mark:]
        count -= 2
    first = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return first + items


def _may_be_stored(name: str, trust: Trust) -> bool:
    """Whether a module may hold this class as a value, such as the kind of its norms."""
    return name in STORED or lies_in(name, ("torch.nn", *trust.allow))


def _objection(opcode: str, taken: Sequence[_Value], admitted: Mapping[str, object], trust: Trust) -> str | None:
    """Say what is wrong with one step of the program; `taken` is what it pops."""
    is_call = opcode in ("REDUCE", "NEWOBJ")
    for value in taken[1:] if is_call else taken:
        kind = admitted.get(value.name)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and not _may_be_stored(value.name, trust):
            return f"stores the class {value.name}, which another module could call with arguments from the file"
    if opcode == "BUILD":
        return _objection_to_filling(taken[0], taken[1], admitted)
    if not is_call:
        return None
    called, arguments = taken
    kind = admitted.get(called.name)
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    used = arguments if opcode == "NEWOBJ" or is_enum else _Value(opcode, parts=[called, arguments])
    for value in used.all_parts():
        if value.name in admitted:
            return f"calls {value.name}"
    return None


def _objection_to_filling(target: _Value, state: _Value, admitted: Mapping[str, object]) -> str | None:
    if target.is_filled:
        return "sets the state of an object twice, and so could call what it stored first"
    target.is_filled = True
    kind = admitted.get(target.parts[0].name) if target.parts else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    if state.opcode != "EMPTY_DICT":
        return f"sets the state of a {kind.__name__} from something other than a dict"
    if kind.__setstate__ is not nn.Module.__setstate__:
        for value in state.all_parts():
            value.is_checked = True
    for key in state.parts[::2]:
        if not isinstance(key.argument, str) or inspect.isroutine(getattr(kind, key.argument, None)):
            return f"hides {kind.__name__}.{key.argument} behind an attribute"
    return None
