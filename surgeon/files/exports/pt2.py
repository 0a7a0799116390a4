"""Programs of torch's own, as `torch.export.save` writes them: .pt2.

`torch.export.load` can run what is in a file, so none is opened unless the user says so. The one that was just written
is opened in order to compare it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgeon._torch_compat import pytree
from surgeon.errors import ModelError, StoreError
from surgeon.files.exports.base import Captured, Export, Port, Program
from surgeon.files.exports.compiled import flat
from surgeon.models.copies import where
from surgeon.models.sandbox import quietly

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_EXTRA = "/extra/"  # the folder in the archive that holds what else the file says
_OF_ARCHIVE = "/.data/"  # the folder whose content torch makes of all others


class Pt2(Export):
    """A program of torch's own."""

    name = "a program of torch.export"
    suffixes = (".pt2",)
    runs_when_opened: ClassVar[bool] = True

    def write(self, captured: Captured, path: Path, *, opset: int | None) -> dict[str, Any]:
        _save(captured.program, path, {})
        return {}

    def open(self, path: Path) -> Program:
        try:
            with quietly(), path.open("rb") as file:
                return _Torch(torch.export.load(file), self.said(path))
        except Exception as error:  # whatever a damaged file makes torch say
            raise ModelError(f"{path} cannot be opened as a .pt2: {where(error)}", todo="Export it again.") from error

    def add(self, path: Path, captured: Captured, said: Mapping[str, str]) -> None:
        before = _records(path)
        _save(captured.program, path, dict(said))
        if _records(path) != before:
            raise StoreError(
                "torch has written another program the second time", todo="Nothing was written; try again."
            )

    def said(self, path: Path) -> dict[str, str]:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if _EXTRA in name]
            return {name.partition(_EXTRA)[2]: archive.read(name).decode() for name in names}


class _Torch(Program):
    """A program that torch has loaded."""

    kind = ".pt2"

    def __init__(self, program: ExportedProgram, said: Mapping[str, str]) -> None:
        self.said = said
        self.module: nn.Module = program.module(check_guards=False)
        self._wide = _widened(program)
        held = [*self.module.named_parameters(), *self.module.named_buffers()]
        self.tensors = {name: tensor.detach() for name, tensor in held}
        signature = program.graph_signature
        found = {node.name: node.meta.get("val") for node in program.graph.nodes}
        ends = next(node for node in program.graph.nodes if node.op == "output").args[0]
        values = {node.name: node.meta.get("val") for node in ends if isinstance(node, torch.fx.Node)}
        self.inputs = tuple(_ports(found, signature.user_inputs))
        self.outputs = tuple(_ports(values, signature.user_outputs))

    def run(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        narrow = all(tensor.dtype != torch.float64 for tensor in self.tensors.values())
        is_wide = any(one.dtype == torch.float64 for one in (*tensors.values(), *flat(self, args, kwargs)))
        with torch.no_grad():
            return functional_call(self._wide if narrow and is_wide else self.module, dict(tensors), args, dict(kwargs))


def _widened(program: ExportedProgram) -> nn.Module:
    """Give the program with float64 wherever a step names the dtype that the network was exported in."""
    made = program.module(check_guards=False)

    def wide(value: Any) -> Any:
        return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value

    for node in made.graph.nodes:
        if node.op == "call_function":
            args, kwargs = pytree.tree_map_only(torch.dtype, wide, (node.args, dict(node.kwargs)))
            node.args, node.kwargs = args, kwargs
    made.recompile()
    return made


def _ports(values: Mapping[str, Any], names: Any) -> list[Port]:
    found = [(name, values.get(name)) for name in names if isinstance(name, str)]
    return [
        Port(name, value.dtype, tuple(side if isinstance(side, int) else str(side) for side in value.shape))
        for name, value in found
        if isinstance(value, Tensor)
    ]


def _save(program: ExportedProgram, path: Path, said: dict[str, str]) -> None:
    with quietly(), path.open("wb") as file:
        try:
            torch.export.save(program, file, extra_files=said)
        except (TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as error:
            raise StoreError(
                f"torch cannot write the program: {where(error)}", todo="Write a .pt or .safetensors file."
            ) from error


def _records(path: Path) -> dict[str, int]:
    """Give the checksums of all records of the program."""
    with zipfile.ZipFile(path) as archive:
        held = [one for one in archive.infolist() if _EXTRA not in one.filename and _OF_ARCHIVE not in one.filename]
        return {one.filename: one.CRC for one in held}
