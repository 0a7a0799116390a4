"""What the command `verify` does: load two models, or programs, and compare them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis import example as examples
from surgeon.app import outputs
from surgeon.app.commands import opened
from surgeon.app.given import Given
from surgeon.app.images import Images
from surgeon.files.atomic import claim
from surgeon.fitting import on_data
from surgeon.fitting.processes import joined
from surgeon.models.progress import Progress, parts, silent
from surgeon.proof.report import Report
from surgeon.surgery import compare
from surgeon.surgery import outputs as outputs_of


def judge(
    name: str, other: str | Path | None, given: Given, progress: Progress, images: Images | None, **how: Any
) -> Report | None:
    """Compare two models, on images as well if there are any; or one with a file of outputs, which is a Path.

    `how` is more that `surgeon.verify` takes. Of several processes the first one compares, and the others give None.
    """
    if not isinstance(other, str):
        return compare_outputs(name, Path(other or ""), given, progress)
    if images is not None:
        return verify_on(name, other, images, given, progress, **how)
    return verify(name, other, given, progress, **how)


def verify(name_a: str, name_b: str, given: Given, progress: Progress = silent, **how: Any) -> Report:
    """Load two models and compare them."""
    a, b = _opened(name_a, name_b, given, progress)
    inputs = [examples.read(text, a, seed=given.seed) for text in given.inputs]
    return compare.verify(a, b, inputs or None, seed=given.seed, progress=parts(progress, 0.2, 1), **how)


def verify_on(
    name_a: str, name_b: str, images: Images, given: Given, progress: Progress = silent, **how: Any
) -> Report | None:
    """Load two models, and compare them on images and then as `verify` does.

    Of several processes each looks at its share of the images, and the first one compares the models; the others give
    None.
    """
    a, b = _opened(name_a, name_b, given, progress)
    inputs = [examples.read(text, a, seed=given.seed) for text in given.inputs]
    progress("reading the images", 0.2)
    data = images.read(a, inputs[0] if inputs else None, seed=given.seed, trust=given.trust)
    with joined(given.device) as processes:
        step = parts(progress, 0.25, 0.6)
        found = on_data.measured(a, b, data, seed=given.seed, processes=processes, progress=step)
    if not processes.is_first:
        return None
    known = inputs or [next(iter(data)).inputs.batched(1)]
    report = compare.verify(a, b, known, seed=given.seed, progress=parts(progress, 0.6, 1), **how)
    return replace(report, data=found)


def compare_outputs(name: str, path: Path, given: Given, progress: Progress = silent) -> Report:
    """Load a model, and compare it with outputs that were kept in a file."""
    progress(f"loading {name}", 0)
    return outputs_of.compare_outputs(opened(name, given), path, progress=parts(progress, 0.2, 1))


def save_outputs(
    name: str, path: Path, given: Given, progress: Progress, *, sites: bool, store_inputs: bool, force: bool
) -> None:
    """Load a model, and keep what it gives in a file."""
    claim(path, force=force, suffixes=(outputs_of.SUFFIX,), origins=outputs.read_for(name, given))
    progress(f"loading {name}", 0)
    model = opened(name, given)
    inputs: list[Any] = [examples.read(text, model, seed=given.seed) for text in given.inputs]
    how: dict[str, Any] = {"sites": sites, "store_inputs": store_inputs, "force": force, "name": name}
    step = parts(progress, 0.2, 1)
    outputs_of.save_outputs(model, path, inputs or None, seed=given.seed, progress=step, **how)


def read_for(name_a: str, other: str | Path | None, given: Given, images: Images | None) -> list[str | Path]:
    """List the files that comparing reads, which nothing that is written may replace."""
    return [*outputs.read_for(name_a, given, other), *(() if images is None else images.files)]


def _opened(name_a: str, name_b: str, given: Given, progress: Progress) -> tuple[nn.Module, nn.Module]:
    progress(f"loading {name_a}", 0)
    a = opened(name_a, given)
    progress(f"loading {name_b}", 0.1)
    return a, opened(name_b, given)
