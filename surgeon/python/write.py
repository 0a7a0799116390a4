"""A network → a folder with `model.py`, plain torch, and `model.safetensors`, which are run and compared with it.

Nothing is left behind unless the written network computes what the network does: the verifier compares them in this
process, and a fresh process without surgeon runs it in its own dtype and in float64.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon._version import __version__
from surgeon.errors import CaptureError, StoreError, SurgeonError, VerifyError, printable
from surgeon.files.atomic import claim, write_atomically
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import quietly
from surgeon.octave.absorb import undone
from surgeon.proof.distance import dtype_name
from surgeon.proof.report import Report
from surgeon.python.nested import TODO
from surgeon.python.run_alone import PROGRAM
from surgeon.python.source import Source, source
from surgeon.surgery.compare import compare
from surgeon.surgery.history import as_data

CODE, WEIGHTS, HEADER = "model.py", "model.safetensors", "surgeon.python"
_LIMIT = 1e-12  # relative L2 in float64: it is the same arithmetic
_HOURS = 3600  # seconds that the run in a process of its own may take


@dataclass(frozen=True, slots=True)
class WrittenNetwork:
    """What was written, where, and how it was verified."""

    folder: Path
    name: str
    report: Report
    left_out: tuple[str, ...]  # tensors of modules that take no part in what the network computes


def claim_folder(folder: Path, *, force: bool, origins: Sequence[str | PathLike[str]] = ()) -> None:
    """Make sure, before any work is done, that both files may be written; the folder itself need not exist.

    Raises:
        StoreError: one of them exists and `force` was not given, or the folder cannot be made.
    """
    if folder.is_dir():
        for name in (CODE, WEIGHTS):
            claim(folder / name, force=force, suffixes=(".py", ".safetensors"), origins=origins)
    elif folder.exists() or folder.is_symlink():
        raise StoreError(f"{folder} is not a folder", todo="Give another one with --python.")
    elif not folder.parent.is_dir():
        todo = "Make it first, or give another one with --python."
        raise StoreError(f"there is no folder {folder.parent}", todo=todo)


def write_python(
    model: nn.Module,
    inputs: Inputs | None,
    folder: Path,
    *,
    origin: str,
    force: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> WrittenNetwork:
    """Write a network as Python; `origin` says in the head of the file what it was written from.

    Raises:
        CaptureError: the code of a module cannot be followed, or no input is known.
        VerifyError: what was written computes something else; nothing is left behind.
    """
    claim_folder(folder, force=force)
    if inputs is None:
        raise CaptureError("no input is known to run the network on", todo="Pass one: --input 1,3,224,224.")
    model = undone(duplicate(devices.on(model, devices.CPU))).eval()  # sums and activations are to be read as such
    inputs = inputs.cast_for(model)
    progress("writing Python", 0)
    head = _head(origin, inputs)
    made = source(duplicate(model), inputs, head)
    _check_other_sizes(model, inputs, made, head)
    with tempfile.TemporaryDirectory(prefix="surgeon-") as room:
        part = Path(room)
        (part / CODE).write_text(made.text, encoding="utf-8")
        tensors = {name: tensor.clone().contiguous() for name, tensor in made.tensors.items()}
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        progress("comparing it", 0.2)
        report = compare(model, _imported(part, made), inputs, seed, silent)
        if not report:
            failed = next((check.says for check in report.checks if not check.passed), report.verdict)
            what = "the Python that was written does not compute what the network does"
            raise VerifyError(f"{what}: {failed}", todo=TODO)
        progress("running it in a process of its own", 0.7)
        _run_alone(model, inputs, part)
        said = json.dumps({"version": __version__, "origin": origin, "verified": _verdict(report), **as_data(model)})
        metadata = {"format": "pt", HEADER: said}
        progress(f"writing {folder}", 0.9)
        _publish(part / CODE, tensors, metadata, folder, force=force)
    return WrittenNetwork(folder, made.name, report, made.left_out)


def _head(origin: str, inputs: Inputs) -> str:
    return (
        f"Written by surgeon {__version__} from {printable(origin)}.\n\n"
        "Before it was written, it was run in a process without surgeon and compared with\n"
        "that network: in float64 and in its own dtype, both computed the same.\n"
        f"It is called as with {inputs}, and does what the network\n"
        "does in eval mode. `load()` gives the network with its weights."
    )


def _verdict(report: Report) -> dict[str, Any]:
    checks = [{"name": one.name, "measured": one.measured, "limit": one.limit} for one in report.checks]
    return {"verdict": report.verdict, "dtype": report.dtype, "checks": checks}


def _check_other_sizes(model: nn.Module, inputs: Inputs, made: Source, head: str) -> None:
    """Make sure that the text does not hold for the sizes of the example alone, if the network takes others.

    Raises:
        CaptureError: it would be another one.
    """
    for other in _others(inputs):
        try:
            with quietly(0):
                other.call(duplicate(model))
        except Exception:  # the network does not take this size
            continue
        if source(duplicate(model), other, head).text != made.text:
            raise CaptureError(
                f"the network does different things for inputs of {inputs} and {other}, and Python would always do "
                "what it does for the first",
                todo=TODO,
            )
        return


def _others(inputs: Inputs) -> list[Inputs]:
    """Give inputs of other sizes: a larger map and batch, then a larger batch alone."""

    def larger(t: Tensor) -> Tensor:
        is_map = t.dim() in (3, 4) and t.is_floating_point()
        return nn.functional.pad(t, (0, 32, 0, 32)) if is_map else t

    return [inputs.map(larger).batched(inputs.batch + 1), inputs.batched(inputs.batch + 1)]


def _imported(folder: Path, made: Source) -> nn.Module:
    """Run the text that was just written, and load its weights; it gives the named tuples that the network gives."""
    spec = importlib.util.spec_from_file_location("surgeon_written_model", folder / CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with quietly(0):
            spec.loader.exec_module(module)
            for name, kind in made.tuples.items():
                if vars(module)[name]._fields == vars(kind)["_fields"]:
                    setattr(module, name, kind)
            loaded: nn.Module = module.load()
    except Exception as error:
        raise VerifyError(f"the Python that was written does not run: {error}", todo=TODO) from error
    return loaded


def _run_alone(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    """Run what was written where surgeon cannot be imported, and compare what it gives with the network's outputs."""
    own = devices.dtype_of(model)
    expected = _in_double(model, inputs)
    names = [dtype_name(own), *(["float64"] if expected is not None and own != torch.float64 else [])]
    given = {"args": inputs.args, "kwargs": dict(inputs.kwargs), "dtypes": names}
    torch.save(given, folder / "inputs.pt")
    paths = [path for path in sys.path if path]
    blocked = ["surgeon", "torchvision", "timm", *_packages(model)]
    command = [sys.executable, "-I", "-c", PROGRAM, str(folder), json.dumps(paths), json.dumps(blocked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_HOURS, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise VerifyError(f"the Python that was written does not run in a process of its own: {said}", todo=TODO)
    outputs = torch.load(folder / "outputs.pt", weights_only=True)
    if expected is not None and (why := _difference(expected, outputs["float64"])) is not None:
        raise VerifyError(f"the Python that was written gives other outputs in a process of its own: {why}", todo=TODO)


def _in_double(model: nn.Module, inputs: Inputs) -> list[Any] | None:
    try:
        with quietly(0):
            return pytree.tree_leaves(inputs.cast(torch.float64).call(duplicate(model).double()))
    except Exception:  # it does not run in float64
        return None


def _difference(expected: list[Any], found: list[Any]) -> str | None:
    expected = [one for one in expected if isinstance(one, Tensor)]
    found = [one for one in found if isinstance(one, Tensor)]
    if [tuple(one.shape) for one in expected] != [tuple(one.shape) for one in found]:
        return "they have other shapes"
    for one, other in zip(expected, found, strict=True):
        far = (one.double() - other.double()).norm() / one.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
        if not far <= _LIMIT and not torch.equal(one, other):
            return f"relative L2 {far:.1e} in float64"
    return None


def _packages(model: nn.Module) -> list[str]:
    """Name the packages that the classes of a network come from."""
    return sorted({type(one).__module__.partition(".")[0] for one in model.modules()} - {"torch", "builtins"})


def _publish(code: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], folder: Path, *, force: bool) -> None:
    """Put both files where they belong; where the second cannot be written, a folder that was made is removed."""
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        write_atomically(folder / WEIGHTS, lambda part: save_file(dict(tensors), part, metadata=metadata), force=force)
        write_atomically(folder / CODE, lambda part: shutil.copyfile(code, part), force=force)
    except SurgeonError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
