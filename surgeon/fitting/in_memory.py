"""Fit models that are in memory, and choose what to convert of them: what `surgeon.fit` and `plan(data=)` do."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis import example as examples
from surgeon.analysis.example import Example
from surgeon.errors import PlanError
from surgeon.fitting import budget as budgets
from surgeon.fitting import data as sources
from surgeon.fitting.budget import Chosen
from surgeon.fitting.data import Data
from surgeon.fitting.fit import How
from surgeon.fitting.fitted import Settings, carry_out_
from surgeon.fitting.processes import joined
from surgeon.models import devices
from surgeon.models.copies import Model, duplicate
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.look import network_for


def fit(
    model: Model,
    reference: nn.Module,
    data: Any,
    *,
    labels: Any = None,
    images: int | None = None,
    batch: int | None = None,
    preprocess: str | None = None,
    distil: int = 0,
    resume: str | PathLike[str] | None = None,
    example: Example | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Return a copy of a converted model with its blocks fitted to what their convs gave, on images without labels.

    `reference` is the model that it was converted from. `data` is a tensor of images (n, channels, height, width),
    anything that yields batches, or a source as the command line takes it; `images` takes so many of them. `labels` are
    used to measure the accuracy alone. With `distil` it is then trained for so many steps against the reference's
    outputs. `resume` names a file in which an interrupted fit is continued.

    `history` of the result says how far each site and the whole network were from the reference, before and after.

    >>> import torch
    >>> from surgeon import convert, history
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> recipe = {"surgeon": 1, "rules": [{"swap": "hetconv", "with": {"p": 2}}]}
    >>> fitted = fit(convert(model, recipe, (1, 8, 9, 9)), model, torch.randn(32, 8, 9, 9))
    >>> [step.operation for step in history(fitted)]
    ['convert', 'fit']

    Raises:
        FitError: it was not converted from the reference. DataError: the images say too little about a site.
    """
    with ordinary():
        own = duplicate(checked(model))
        options: dict[str, Any] = {"labels": labels, "images": images, "batch": batch, "preprocess": preprocess}
        return fit_(
            own, reference, data, **options, distil=distil, resume=resume, example=example, seed=seed, progress=progress
        )


def fit_(
    model: Model,
    reference: nn.Module,
    data: Any,
    *,
    labels: Any = None,
    images: int | None = None,
    batch: int | None = None,
    preprocess: str | None = None,
    distil: int = 0,
    resume: str | PathLike[str] | None = None,
    example: Example | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Fit the blocks of `model` itself, and return it; if something goes wrong, it stays as it was."""
    with ordinary():
        checked(model), checked(reference)
        settings = Settings(How(seed=seed), distil, None if resume is None else Path(resume))
        options: dict[str, Any] = {"labels": labels, "images": images, "batch": batch, "preprocess": preprocess}
        read = images_for(data, reference, example, **options, seed=seed)
        with joined(devices.of(model)) as processes:
            carry_out_(model, reference, read, settings, processes=processes, progress=progress)
    return model


def images(
    source: Any,
    model: nn.Module | None = None,
    *,
    labels: Any = None,
    images: int | None = None,
    batch: int | None = None,
    preprocess: str | None = None,
    example: Example | None = None,
    seed: int = 0,
) -> Data:
    """Read images once, for `plan`, `convert` and `fit`: a folder, a file, a tensor, anything that yields batches.

    `images` takes so many of them, `batch` runs so many at once, `preprocess` says what is done to pictures where the
    library of `model` does not, and `labels` are used to measure accuracy.

    >>> import torch
    >>> images(torch.rand(10, 3, 8, 8), batch=4).images
    10

    Raises:
        DataError: there is no such source, or what is in it cannot be used.
    """
    with ordinary():
        options: dict[str, Any] = {"labels": labels, "images": images, "batch": batch, "preprocess": preprocess}
        return images_for(source, model, example, **options, seed=seed)


def images_for(data: Any, model: nn.Module | None, example: Example | None, *, seed: int, **options: Any) -> Data:
    """Read the images that the user gives for a model."""
    known = None if example is None else examples.make(example, seed=seed)
    return sources.of(data, model, **options, seed=seed, example=known)


def choose(
    model: nn.Module,
    recipe: Recipe,
    example: Example | None,
    data: Any,
    budget: str | None,
    *,
    bake: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Chosen:
    """Measure on images what each conv that a recipe would swap loses, and choose by a budget if there is one.

    Raises:
        PlanError: there are no images to measure with, or the budget cannot be reached.
    """
    limit = None if budget is None else budgets.parse(str(budget))
    if data is None:
        raise PlanError("a budget needs images to measure with", todo="Give them: plan(..., data=images).")
    read = images_for(data, checked(model), example, seed=seed)
    network = network_for(model, next(iter(read)).inputs.batched(1) if example is None else example, seed=seed)
    with joined(devices.of(network.model)) as processes:
        options: dict[str, Any] = {"bake": bake, "seed": seed, "processes": processes, "progress": progress}
        return budgets.choose(network, recipe, read, budget=limit, **options)
