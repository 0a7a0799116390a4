"""What was done to the model, step by step, and what was measured at each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from surgeon.display import words
from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.markup import filled
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Entry, Plan

_TITLES = {"convert": "Converted", "fit": "Fitted to the original", "fuse": "Fused"}
_MEASURES = {  # what the figures of the self-checks are called in full
    "whole": "outputs, relative L2",
    "worst": "worst site, relative L2",
    "worst_path": "worst site",
    "sites": "sites compared",
    "approximate": "approximate by design",
    "folded": "blocks folded",
}
_FLAGS = {
    "dense": "blocks that cost less than their conv were folded too",
    "keep_norms": "every block became the conv and the norm that it was made of",
    "branches": "linear sub-graphs became one conv each",
    "norms": "norms were folded into the convs beside them",
}


class History(Section):
    """The steps as a timeline: the recipe, the plan, the versions, the hashes and the measurements of each."""

    title = "History"
    anchor = "history"
    place = 80

    def applies(self, data: PageData) -> bool:
        return bool(data.history)

    def body(self, data: PageData) -> Markup:
        name = next(one.name for one in reversed(data.models) if one.history)
        return filled("history.html", name=name, steps=[_step(one) for one in data.history])


def _step(step: Operation) -> dict[str, Any]:
    """Collect what the template shows of a step."""
    plan = None if step.plan is None else Plan.model_validate(step.plan)
    return {
        "title": _TITLES[step.operation],
        "step": step,
        "plan": plan,
        "said": _said(step, plan),
        "measured": list(_measures(step.measured)),
        "entries": [] if plan is None else [_entry(one) for one in plan.convs],
    }


def _said(step: Operation, plan: Plan | None) -> str:
    """Say in one sentence what was done."""
    if plan is not None:
        swapped = sum(one.swap is not None for one in plan.convs)
        return f"{swapped} of {words.convs(len(plan.convs))} became blocks, as the recipe {plan.recipe.name} says."
    said = [words_ for field, words_ in _FLAGS.items() if getattr(step, field)]
    said += [f"the weights were cast to {step.dtype}"] if step.dtype else []
    if step.operation == "fuse":
        said = ["blocks became plain convs", *said]
    elif images := step.measured.get("images"):
        said = [f"the taps of blocks were fitted on {images} images", *said]
    sentence = "; ".join(said)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _measures(found: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """List figures with their names; those within figures have the name of these before them."""
    for key, value in found.items():
        name = f"{under}{_MEASURES.get(key, key.replace('_', ' '))}"
        if isinstance(value, Mapping):
            yield from _measures(value, f"{name}: ")
        elif isinstance(value, float):
            yield name, f"{value:.3g}"
        elif isinstance(value, str | int) and value != "":
            yield name, str(value)
        elif isinstance(value, list | tuple) and value:
            yield name, words.counted(len(value), "entry") if len(value) == 1 else f"{len(value)} entries"


def _entry(one: Entry) -> tuple[str, str, str, str, str]:
    """Write one conv of a plan: path, geometry, what becomes of it, with what, and why."""
    options = ", ".join(f"{name} {value}" for name, value in one.options.items())
    return one.path, one.conv, one.swap or "stays", options, one.skip or one.note or one.rule or ""
