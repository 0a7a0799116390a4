"""What the command `report` and the option `--html` do: models and what was measured of them → a page in a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis import example as examples
from surgeon.app.commands import opened
from surgeon.app.given import Given
from surgeon.app.outputs import claim_page
from surgeon.errors import printable
from surgeon.files.atomic import write_atomically
from surgeon.models.progress import Progress, parts, silent
from surgeon.page.make import Page, page_of
from surgeon.surgery import plan as plans
from surgeon.surgery.plan import Plan
from surgeon.surgery.trials import Trials

_log = logging.getLogger("surgeon")


def report(
    names: Sequence[str],
    given: Given,
    path: Path,
    progress: Progress = silent,
    *,
    recipe: str | None = None,
    plan: Path | None = None,
    bench: bool = False,
    force: bool = False,
) -> Page:
    """Load one model or two, measure what is asked for, and write the page."""
    claim_page(path, given, *names, recipe, plan, force=force)
    decided = plans.read(plan) if plan is not None else None
    models = _loaded(names, given, parts(progress, 0, 0.3))
    how: dict[str, Any] = {"recipe": recipe, "plan": decided, "bench": Trials() if bench else None}
    return write(path, models, given, force=force, progress=parts(progress, 0.3, 1), **how)


def write(
    path: Path,
    models: Sequence[tuple[str, nn.Module]],
    given: Given,
    *,
    force: bool = False,
    progress: Progress = silent,
    **how: Any,
) -> Page:
    """Put models that are loaded on a page, and write it; `how` is what `page_of` takes."""
    example = examples.read(given.inputs[0], models[0][1], seed=given.seed) if given.inputs else None
    page = page_of(models, example, seed=given.seed, progress=progress, command=_command(), **how)
    text = page.html
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"), force=force)
    _log.info(f"written: {path}; open it in a browser")
    return page


def of_files(path: Path, names: Sequence[str], given: Given, *, force: bool, **how: Any) -> Page:
    """Load models again, and put them on a page with what was measured of them."""
    return write(path, _loaded(names, given, silent), given, force=force, **how)


def of_plan(path: Path, name: str, looked: Sequence[nn.Module], decided: Plan, given: Given, *, force: bool) -> Page:
    """Put a plan that was just made on a page, with the model that it is for."""
    return write(path, [(_label(name), looked[0])], given, force=force, plan=decided)


def _loaded(names: Sequence[str], given: Given, progress: Progress) -> list[tuple[str, nn.Module]]:
    models = []
    for i, name in enumerate(names):
        progress(f"loading {name}", i / len(names))
        models.append((_label(name), opened(name, given)))
    return models


def _label(name: str) -> str:
    """Call a model by the name of its file, or by how it is named."""
    return Path(name).name if Path(name).exists() else name


def _command() -> str | None:
    """Write the command that runs, as far as a page may show it: paths are shortened to the names of files."""
    words = sys.argv[1:]
    if not words:
        return None
    short = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return printable("surgeon " + " ".join(f"'{word}'" if " " in word else word for word in short))
