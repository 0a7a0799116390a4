"""Export a network: write a program, run it, compare it with the network, and only then let the file take its place.

The verdict stands in the metadata of the file, with the history of the network and the versions that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis.example import Example
from surgeon.blocks import Operator
from surgeon.display import words
from surgeon.display.exported import exported_view
from surgeon.display.shown import Shown
from surgeon.errors import CaptureError, StoreError, SurgeonError, VerifyError
from surgeon.files import exports
from surgeon.files.atomic import claim, write_atomically
from surgeon.files.exports.base import SAID, Captured, Export, Port
from surgeon.files.exports.capture import capture
from surgeon.files.exports.compiled import Compiled
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof import verify as equivalence
from surgeon.proof.distance import dtype_name
from surgeon.proof.report import Report
from surgeon.surgery import history as histories
from surgeon.surgery.look import network_for


@dataclass(frozen=True, slots=True)
class Form:
    """How a network is exported: for images of any size (`dynamic_size`), and in which opset of ONNX."""

    dynamic_size: bool = False
    opset: int | None = None


@dataclass(frozen=True, slots=True)
class Exported(Shown):
    """A file that was exported: what it takes and gives, and what comparing it with the network has shown."""

    path: Path
    kind: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    report: Report
    facts: Mapping[str, Any]  # such as the opset
    blocks: int = 0  # of surgeon's that are left: a program holds steps of torch or of ONNX alone
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        plain = {"path": str(self.path), "kind": self.kind, "bytes": self.bytes, "blocks_left": self.blocks}
        ends = {"inputs": self.inputs, "outputs": self.outputs, "notes": self.notes}
        return plain | ends | dict(self.facts) | {"report": self.report.to_dict()}

    def __rich__(self) -> Any:
        return exported_view(self)


def export(
    model: nn.Module,
    path: str | PathLike[str],
    example: Example | None = None,
    *,
    dynamic_size: bool = False,
    opset: int | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Exported:
    """Write a model as a program, in eval mode: `.onnx` (with the extra `surgeon[onnx]`) or `.pt2`, by the suffix.

    The batch may vary if the model lets it, and with `dynamic_size` height and width, too. The file is run and compared
    with the model before it takes its place; the verdict stands in its metadata. Blocks are exported as they are: fold
    them first, with `fuse`. `load` opens the file again, for `verify`.

    Raises:
        CaptureError: torch cannot follow the model. StoreError: the file cannot be written, or exists.
        VerifyError: the file would not compute what the model does; nothing is written then.
    """
    with ordinary():
        inputs = network_for(model, example, seed=seed).inputs
        form = Form(dynamic_size, opset)
        return write(model, Path(path), inputs, form, force=force, seed=seed, progress=progress)


def is_exported(path: Path, form: Form | None) -> bool:
    """Whether the suffix of a path asks for an export, and make sure before any work is done that it can be made.

    Raises:
        ModelError: something has to be installed first. StoreError: the form is not one that such a file can have.
    """
    if exports.is_export(path):
        kind = exports.of_suffix(path)
        kind.check()
        kind.check_opset(None if form is None else form.opset)
        return True
    if form is not None and form != Form():
        suffixes = " or ".join(exports.suffixes())
        raise StoreError(
            f"--dynamic-size and --opset are for exports, and {path.name} is none",
            todo=f"End its name in {suffixes}, or leave them out.",
        )
    return False


def _checked(model: nn.Module, path: Path) -> Export:
    """Give the kind of file, which the tensors of the network fit in.

    Raises:
        StoreError: the network is larger than such a file can be, or in a dtype in which it could not be run.
    """
    kind = exports.of_suffix(path)
    if kind.dtypes is not None and (dtype := devices.dtype_of(model)) not in kind.dtypes:
        raise StoreError(
            f"the network is stored in {dtype_name(dtype)}, in which an {kind.name} file could not be "
            "run here, and not be compared",
            todo=f"Export it in {' or '.join(map(dtype_name, kind.dtypes))}, or write a .pt2 file.",
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if kind.most_bytes is not None and size > kind.most_bytes:
        raise StoreError(
            f"the tensors of the network have {words.amount(size)}B, and an {kind.name} file holds less than 2 GiB",
            todo="Write a .pt2 or .safetensors file.",
        )
    return kind


def write(
    model: nn.Module,
    path: Path,
    inputs: Inputs | None,
    form: Form | None = None,
    *,
    force: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Exported:
    """Write a network as the suffix of the path says, and compare what was written with it.

    Raises:
        CaptureError: torch cannot follow the network. StoreError: the file cannot be written, or exists.
        VerifyError: the file does not compute what the network does; then nothing is written.
    """
    form = form or Form()
    claim(path, force=force, suffixes=exports.suffixes())
    is_exported(path, form)
    kind = _checked(model, path)
    if inputs is None:
        raise CaptureError(
            "no input is known that the model accepts, and exporting runs it",
            todo="Pass one: --input 1,3,224,224 (from Python, example=(1, 3, 224, 224)).",
        )
    with ordinary():
        progress("following the network", 0)
        captured = capture(model, inputs, dynamic_size=form.dynamic_size)
        made: list[Exported] = []

        def fill(part: Path) -> None:
            progress(f"writing {path.name}", 0.3)
            facts = kind.write(captured, part, opset=form.opset)
            program = Compiled(kind.open(part))  # it is ours, so it may run
            report = _compared(model, program, inputs, path, seed, parts(progress, 0.5, 0.95))
            kind.add(part, captured, _said(model, inputs, report))
            taken, given = (tuple(map(str, ends)) for ends in _ports(program, captured))
            left = sum(isinstance(module, Operator) for module in program.modules())
            size = part.stat().st_size
            made.append(Exported(path, kind.name, size, taken, given, report, facts, left, captured.notes))

        write_atomically(path, fill, force=force)
    return made[0]


def _ports(program: Compiled, captured: Captured) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Say what a file takes and gives, with names that a reader knows in place of torch's symbols."""

    def named(port: Port, name: str) -> Port:
        sides = port.sides and tuple(
            captured.sides.get(one, one) if isinstance(one, str) else one for one in port.sides
        )
        return replace(port, name=name, sides=sides)

    taken, given = program.program.inputs, program.program.outputs
    names = captured.outputs if len(captured.outputs) == len(given) else tuple(one.name for one in given)
    outputs = tuple(named(port, name) for port, name in zip(given, names, strict=True))
    return tuple(named(port, port.name) for port in taken), outputs


def _compared(model: nn.Module, program: Compiled, inputs: Inputs, path: Path, seed: int, progress: Progress) -> Report:
    """Run what was written, and compare it with the network on the CPU, also with a batch that nothing was made for."""
    progress("running it, and comparing it with the network", 0)
    source = devices.on(model, devices.CPU)
    program.answering_like(calls.outputs(source, inputs, seed=seed))
    more = inputs.batched(inputs.batch + 1)
    given = [inputs] if inputs.batch == 1 or program.refusal(more.args, more.kwargs) else [inputs, more]
    try:
        report = equivalence.verify(source, program, given, seed=seed)
    except SurgeonError as error:
        raise VerifyError(
            f"what was exported to {path.name} cannot be compared with the network: {error.problem}",
            todo="Nothing was written. Write another kind of file, such as .pt.",
        ) from error
    if not report.equivalent:
        wrong = "; ".join(one.says for one in report.checks if not one.passed)
        raise VerifyError(
            f"what was exported to {path.name} does not compute what the network does: {wrong}",
            todo="Nothing was written. Write another kind of file, such as .pt.",
        )
    return report


def _said(model: nn.Module, inputs: Inputs, report: Report) -> dict[str, str]:
    """Say what stands in the metadata."""
    checks = [
        {"name": one.name, "measured": one.measured, "limit": one.limit, "says": one.says} for one in report.checks
    ]
    said = {
        "verdict": report.verdict,
        "checks": json.dumps(checks),
        "distance": json.dumps(
            [{"input": one.input, "float64": one.float64, "own": one.own} for one in report.distances]
        ),
        "history": json.dumps(histories.as_data(model)),
        "versions": json.dumps(histories.versions()),
        "input": json.dumps(inputs.record),
    }
    return {SAID + name: value for name, value in said.items()}
