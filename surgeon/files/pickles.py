"""Read what `torch.save` wrote without running it.

A pickle is a program: it may name any function of any installed package, and call it. torch's weights-only unpickler
runs that program with a list of names it may use. A whole `nn.Module` needs more names than tensors do, and which ones
depends on the file, so a file is read three times:

1. **Names.** `names` says which a file may use, and looks up what they stand for.
2. **Calls.** `steps` follows the program on paper: whatever no honest file does is refused.
3. **Load.** `torch.load(weights_only=True)`, with exactly those names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from surgeon._torch_compat import pickle_program
from surgeon.errors import ModelError
from surgeon.files import arrays, calls
from surgeon.files.faults import damaged
from surgeon.files.names import (
    HARMLESS,
    NUMPY,
    PACKAGES,
    Trust,
    admitted,
    lies_in,
    offered_blocks,
    on_path,
    unknown_graph,
)
from surgeon.files.steps import UNKNOWN_GRAPH, Lengths, Program
from surgeon.files.values import bytes_per_number
from surgeon.models.sandbox import unpickling
from surgeon.nn import MOVED, LaterFormatError

__all__ = ["PACKAGES", "Trust", "lies_in", "offered_blocks", "on_path", "read", "read_legacy"]


def read(path: Path, trust: Trust, records: Mapping[str, int]) -> Any:
    """Unpickle the zip archive that `torch.save` wrote; `records` are the sizes of what lies in it.

    Raises:
        ModelError: a name that is not admitted, a call that no honest file makes, a damaged file.
    """
    with path.open("rb") as file:
        if trust.unsafe_pickle:
            return _run(path, file)
        names = _names(path, file)
        try:
            file.seek(0)
            program = Program(pickle_program(file))
        except Exception as error:
            raise _unreadable(path, error) from error
        if not names <= program.names:
            raise _distrusted(path, "is read differently by different readers")
        found = admitted(path, sorted(names), trust)
        _follow(path, program, found, trust, lambda key, _: records.get(f"data/{key}"))
        return _load(path, file, found)


def read_legacy(path: Path, trust: Trust) -> Any:
    """Unpickle what torch < 1.6 wrote, tensors only: pickles in a row, and then the bytes of the storages.

    Raises:
        ModelError: it holds more than tensors, or is damaged.
    """
    with path.open("rb") as file:
        if trust.unsafe_pickle:
            return _run(path, file)
        try:
            *_, program, _keys = [Program(file) for _ in range(5)]  # magic, protocol, system, tensors, their order
            held = path.stat().st_size - file.tell()
        except Exception as error:
            raise _unreadable(path, error) from error
        if foreign := [name for name in program.names if not _is_torchs(name)]:
            raise ModelError(
                f"{path} was saved by torch < 1.6, or in its format, and holds more than tensors ({foreign[0]})",
                todo="Load it once where you trust it, and save it again with torch.save.",
            )
        _follow(path, program, {}, trust, _Room(held).take)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise damaged(path, error) from error


class _Room:
    """How many bytes the storages in a file can have, all together."""

    def __init__(self, held: int) -> None:
        self.held, self.taken = held, dict[str, int]()

    def take(self, key: str, size: int) -> int | None:
        self.taken[key] = max(size, self.taken.get(key, 0))
        return size if sum(self.taken.values()) <= self.held else None


def _is_torchs(name: str) -> bool:
    """Whether torch's weights-only reader has a name of its own: a tensor's, or one of what lies around tensors."""
    is_listed = calls.is_listed(name) and name not in HARMLESS and name not in NUMPY and name != calls.BLANK
    return is_listed or (name.startswith("torch.") and (name in calls.TYPES or bytes_per_number(name) is not None))


def _follow(path: Path, program: Program, found: Mapping[str, object], trust: Trust, lengths: Lengths) -> None:
    """Refuse a program that does what no honest one does."""
    try:
        culprit = program.objection(found, trust, lengths)
    except (IndexError, KeyError, ValueError) as error:  # it takes from the stack or the memo what is not there
        raise _unreadable(path, error) from error
    if culprit == UNKNOWN_GRAPH:
        raise unknown_graph(path)
    if culprit is not None:
        raise _distrusted(path, culprit)


def _load(path: Path, file: IO[bytes], found: Mapping[str, object]) -> Any:
    names: list[Any] = [(what, name) for name, what in found.items()]
    file.seek(0)
    try:
        with unpickling([*names, *arrays.globals_of(found)]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a __setstate__ makes of a state that another version wrote
        raise _unreadable(path, error) from error


def _distrusted(path: Path, culprit: str) -> ModelError:
    return ModelError(
        f"{path} {culprit}, which no file may do",
        todo="If you made it, save the state_dict and use --arch. If not, do not trust it; ask for the state_dict.",
    )


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


def _names(path: Path, file: IO[bytes]) -> set[str]:
    """List what the pickle names beyond torch's own tensors and containers."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception as error:  # a truncated archive, an opcode that torch.save does not write
        raise _unreadable(path, error) from error
