"""Export a network: write a program, run it, compare it with the network, and only then let the file take its place.

The verdict stands in the metadata of the file, with the history of the network and the versions that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.blocks import Operator
from surgeon.display import words
from surgeon.display.exported import exported_view
from surgeon.display.shown import Shown
from surgeon.errors import CaptureError, StoreError, SurgeonError, VerifyError
from surgeon.files import exports
from surgeon.files.atomic import claim, write_atomically
from surgeon.files.exports.base import Export
from surgeon.files.exports.capture import capture
from surgeon.files.exports.compiled import Compiled
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof import verify as equivalence
from surgeon.proof.report import Report
from surgeon.surgery import history as histories

PREFIX = "surgeon."  # of the keys in the metadata of a file


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


def check(path: Path, model: nn.Module | None = None) -> Export:
    """Make sure, before any work is done, that an export can be written: what it needs is there, and it is not too big.

    Raises:
        ModelError: something has to be installed first. StoreError: the network is larger than such a file can be.
    """
    kind = exports.of_suffix(path)
    kind.check()
    held = () if model is None else (*model.parameters(), *model.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    if kind.most_bytes is not None and size > kind.most_bytes:
        raise StoreError(
            f"the tensors of the network have {words.amount(size)}B, and an {kind.name} file holds less than 2 GiB",
            todo="Write a .pt2 or .safetensors file.",
        )
    return kind


def export(
    model: nn.Module,
    path: Path,
    inputs: Inputs | None,
    *,
    dynamic_size: bool = False,
    opset: int | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Exported:
    """Write a network as the suffix of the path says, and compare what was written with it.

    Raises:
        CaptureError: torch cannot follow the network. StoreError: the file cannot be written, or exists.
        VerifyError: the file does not compute what the network does; then nothing is written.
    """
    claim(path, force=force, suffixes=exports.suffixes())
    kind = check(path, model)
    if inputs is None:
        raise CaptureError(
            "no input is known that the model accepts, and exporting runs it",
            todo="Pass one: --input 1,3,224,224 (from Python, example=(1, 3, 224, 224)).",
        )
    with ordinary():
        progress("following the network", 0)
        captured = capture(model, inputs, dynamic_size=dynamic_size)
        made: list[Exported] = []

        def write(part: Path) -> None:
            progress(f"writing {path.name}", 0.3)
            facts = kind.write(captured, part, opset=opset)
            program = Compiled(kind.open(part))
            report = _compared(model, program, inputs, path, seed, parts(progress, 0.5, 0.95))
            kind.add(part, captured, _said(model, inputs, report))
            ports = [tuple(map(str, ends)) for ends in (program.program.inputs, program.program.outputs)]
            left = sum(isinstance(module, Operator) for module in program.modules())
            size = part.stat().st_size
            made.append(Exported(path, kind.name, size, *ports, report, facts, left, captured.notes))

        write_atomically(path, write, force=force)
    return made[0]


def _compared(
    model: nn.Module, program: Compiled, inputs: Inputs, path: Path, seed: int, progress: Progress
) -> Report:
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
    checks = [{"name": one.name, "measured": one.measured, "limit": one.limit, "says": one.says} for one in report.checks]
    said = {
        "verdict": report.verdict,
        "checks": json.dumps(checks),
        "distance": json.dumps([{"input": one.input, "float64": one.float64, "own": one.own} for one in report.distances]),
        "history": json.dumps(histories.as_data(model)),
        "versions": json.dumps(histories.versions()),
        "input": json.dumps(inputs.record),
    }
    return {PREFIX + name: value for name, value in said.items()}
