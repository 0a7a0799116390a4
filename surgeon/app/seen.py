"""What the command `kernels` does: load models, look at their kernels, and draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from surgeon.analysis import example as examples
from surgeon.app.commands import labels, opened
from surgeon.app.given import Given
from surgeon.app.outputs import read_for
from surgeon.display import kernel_pictures
from surgeon.figures import kernels as figures
from surgeon.figures.kernels import KernelFigures
from surgeon.files.atomic import claim, write_atomically
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import quietly


def kernels(
    names: Sequence[str],
    given: Given,
    progress: Progress = silent,
    *,
    control: bool = True,
    picture: Path | None = None,
    layers: bool = False,
    force: bool = False,
) -> KernelFigures:
    """Load models and look at their kernels; with `picture`, draw the matrices there."""
    if picture is not None:
        origins = read_for(names[0], given, *names[1:])
        claim(picture, force=force, suffixes=kernel_pictures.SUFFIXES, origins=origins)
        kernel_pictures.check_installed()
    models: dict[str, nn.Module] = {}
    for i, (label, name) in enumerate(zip(labels(names), names, strict=True)):
        progress(f"loading {name}", 0.3 * i / len(names))
        models[label if label not in models else f"{label} ({i + 1})"] = opened(name, given)
    first = next(iter(models.values()))
    example = examples.read(given.inputs[0], first, seed=given.seed) if given.inputs else None
    step = parts(progress, 0.3, 0.95)
    found = figures.kernels(models, example, control=control, seed=given.seed, progress=step)
    if picture is not None:
        progress(f"drawing {picture}", 0.95)
        kind = picture.suffix.removeprefix(".")
        with quietly():  # matplotlib warns of letters that its font does not have
            write_atomically(picture, lambda part: kernel_pictures.write(found, part, kind, layers=layers), force=force)
    return found
