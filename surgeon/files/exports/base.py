"""The contract of an export: a file that holds a program, which is run as it is and has no modules.

A new export is one file in this folder with one subclass of `Export`; `fuse -o`, `verify` and `surgeon.export` find it
by themselves. What it needs beyond surgeon's own dependencies is imported when it is used, and never before.
"""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgeon.errors import ModelError, StoreError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SAID = "surgeon."  # begins the names of what surgeon says in the metadata of a file
SIDES = ("batch", "height", "width")  # what sides that may vary are called


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a program: its name, its dtype, and its sides, of which those with a name may vary.

    >>> str(Port("image", torch.float32, ("batch", 3, 64, 64)))
    'image: batch×3×64×64 float32'
    """

    name: str
    dtype: torch.dtype | None
    sides: tuple[int | str, ...] | None  # None where the file does not say

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor has the sides that the file declares."""
        if self.sides is None:
            return True
        pairs = zip(self.sides, tensor.shape, strict=False)
        return len(self.sides) == tensor.dim() and all(side in (one, -1) or isinstance(one, str) for one, side in pairs)

    def __str__(self) -> str:
        sides = "any shape" if self.sides is None else "×".join(map(str, self.sides)) or "a scalar"
        return f"{self.name}: {sides} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Captured:
    """A network as a program of torch's, with what its outputs are called and what of its sizes may vary."""

    program: ExportedProgram
    outputs: tuple[str, ...]
    sides: Mapping[str, str]  # a symbol of the program → batch, height, width
    notes: tuple[str, ...] = ()  # sentences about what could not vary


class Program(abc.ABC):
    """What an opened file holds: the numbers that it stores, and code that computes with them, or with others.

    It is never copied: copies of a `Compiled` share it, and differ in the numbers that they compute with.
    """

    kind: str  # for messages
    tensors: Mapping[str, Tensor]  # the numbers that it stores, by name
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    said: Mapping[str, str]  # the metadata of the file

    @abc.abstractmethod
    def run(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute with these numbers in place of the stored ones, in their dtype: as stored, or in float64."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


class Export(abc.ABC):
    """One kind of file that holds a program."""

    name: ClassVar[str]  # for messages
    suffixes: ClassVar[tuple[str, ...]]
    extra: ClassVar[str] = ""  # of surgeon's distribution, which brings what it needs
    needs: ClassVar[tuple[str, ...]] = ()  # modules that are imported for it
    most_bytes: ClassVar[int | None] = None  # of tensors that a file can hold
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None  # of networks that can be run from it; None for all
    runs_when_opened: ClassVar[bool] = False  # whether opening a file may run what is in it

    def check(self) -> None:
        """Make sure, before any work is done, that what it needs is installed.

        Raises:
            ModelError: it is not; the message says what to install.
        """
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise ModelError(
                f"{self.name} needs {' and '.join(missing)}, which {are} not installed",
                todo=f"Install it with: pip install 'conv-surgeon[{self.extra}]'.",
            )

    def check_opset(self, opset: int | None) -> None:
        """Make sure that a file can have this opset.

        Raises:
            StoreError: it cannot.
        """
        if opset is not None:
            raise StoreError(f"{self.name} has no opset", todo="Leave out --opset, or write an .onnx file.")

    @abc.abstractmethod
    def write(self, captured: Captured, path: Path, *, opset: int | None) -> dict[str, Any]:
        """Write a program, and say what is to be reported about the file, by name.

        Raises:
            StoreError: it holds a step that this kind of file cannot hold; the message names it.
        """

    @abc.abstractmethod
    def open(self, path: Path) -> Program:
        """Open a file, so that it can be run.

        Raises:
            ModelError: it is damaged, or not of this kind.
        """

    @abc.abstractmethod
    def add(self, path: Path, captured: Captured, said: Mapping[str, str]) -> None:
        """Add metadata to a file that was just written, and leave the program in it as it is."""

    @abc.abstractmethod
    def said(self, path: Path) -> dict[str, str]:
        """Read the metadata of a file, without running what is in it."""
