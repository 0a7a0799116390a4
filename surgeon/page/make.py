"""`surgeon.report`: models in memory → a page to look at."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis import sites
from surgeon.analysis.example import Example
from surgeon.analysis.network import Network
from surgeon.errors import CaptureError, PlanError
from surgeon.files.atomic import claim, write_atomically
from surgeon.files.exports.compiled import Compiled
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked, not_a_model
from surgeon.page.data import PageData
from surgeon.page.gather import gather, kind_said
from surgeon.page.render import render
from surgeon.recipes import recipe as recipes
from surgeon.recipes.recipe import Recipe
from surgeon.surgery import bench as benching
from surgeon.surgery import check, compare
from surgeon.surgery.decide import plan_for
from surgeon.surgery.look import network_for
from surgeon.surgery.plan import Plan
from surgeon.surgery.trials import Trials

SUFFIXES = (".html", ".htm")


class Page:
    """A page to look at: `html` is one file that loads nothing, and a notebook shows it as it is."""

    def __init__(self, data: PageData) -> None:
        self.data = data

    @cached_property
    def html(self) -> str:
        """The whole file."""
        return render(self.data)

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the page atomically.

        Raises:
            StoreError: the file exists and `force` is not given, its name does not end in .html, or it cannot be
                written.
        """
        place, text = Path(path), self.html
        claim(place, force=force, suffixes=SUFFIXES)
        write_atomically(place, lambda part: part.write_text(text, encoding="utf-8"), force=force)

    def __repr__(self) -> str:
        return f"<Page {self.data.title!r}: save it with .save('report.html')>"

    def _repr_html_(self) -> str:
        """Show the page in a frame of its own, where its style touches nothing else."""
        within = escape(self.html, quote=True)
        return f'<iframe title="{escape(self.data.title)}" width="100%" height="720" srcdoc="{within}"></iframe>'


def report(
    model: nn.Module,
    other: nn.Module | None = None,
    example: Example | None = None,
    *,
    recipe: str | PathLike[str] | Recipe | None = None,
    plan: Plan | None = None,
    bench: bool = False,
    title: str | None = None,
    date: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Page:
    """Make a page of all that is known of a model: its convs, what became of them, its history.

    With a `recipe` or a `plan` it shows what that would make of the model; with an `other` model, how far that is from
    `model`, as `verify` says; with `bench`, how long both take. `date` is written as it is given, or is today's.

    >>> page = report(nn.Sequential(nn.Conv2d(3, 8, 3)), example=(1, 3, 8, 8), recipe="acnet", date="1 May")
    >>> page
    <Page 'Sequential': save it with .save('report.html')>
    >>> page.html.startswith("<!doctype html>")
    True

    Raises:
        PlanError: the plan does not fit the model, or a rule of the recipe claims no conv.
    """
    models = [model] if other is None else [model, other]
    for one in models:
        if not isinstance(one, nn.Module):
            raise not_a_model(one)
    with ordinary():
        names = [kind_said(one) for one in models]
        labels = names if other is None else [f"{name} ({side})" for name, side in zip(names, "AB", strict=True)]
        how: dict[str, Any] = {"recipe": recipe, "plan": plan, "bench": Trials() if bench else None, "seed": seed}
        return page_of(
            list(zip(labels, models, strict=True)), example, title=title, date=date, **how, progress=progress
        )


def page_of(
    models: Sequence[tuple[str, nn.Module]],
    example: Example | None = None,
    *,
    recipe: str | PathLike[str] | Recipe | None = None,
    plan: Plan | None = None,
    bench: Trials | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **rest: Any,
) -> Page:
    """Measure what is asked for of one or two models that have labels, and put it on a page.

    `rest` is what `gather` takes beside.
    """
    progress("looking at the models", 0)
    networks = [(label, _network(one, example, plan, seed)) for label, one in models]
    first = networks[0][1]
    if recipe is not None:
        progress("planning", 0.1)
        wanted = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
        plan = plan_for(first, wanted, bake=False, seed=seed)[0]
    elif plan is not None and not plan.baked:
        check.check(plan, sites.survey(first))
    if len(models) == 2 and "report" not in rest:
        a, b = (one for _, one in models)
        rest["report"] = compare.verify(a, b, example, seed=seed, progress=parts(progress, 0.2, 0.6))
    if bench is not None:
        rest["timings"] = _timed(models, first, bench, parts(progress, 0.6, 0.9))
    progress("drawing", 0.9)
    rest["date"] = rest.get("date") or datetime.date.today().isoformat()
    return Page(gather(networks, plan=plan, seed=seed, **rest))


def _network(model: nn.Module, example: Example | None, plan: Plan | None, seed: int) -> Network:
    """Look at a model; of a file that holds a program there is nothing to look at but its outside."""
    if isinstance(model, Compiled):
        return Network(model)
    return network_for(checked(model), example, plan=plan, seed=seed)


def _timed(
    models: Sequence[tuple[str, nn.Module]], first: Network, trials: Trials, progress: Progress
) -> tuple[benching.Timing, ...]:
    if first.inputs is None:
        raise CaptureError("no input is known to run the models on", todo="Pass one: example=(1, 3, 224, 224).")
    if programs := [label for label, one in models if isinstance(one, Compiled)]:
        raise PlanError(f"{programs[0]} is an export, which is not timed", todo="Leave --bench out.")
    return benching.run(models, first.inputs, trials.settings, rounds=trials.rounds, progress=progress)
