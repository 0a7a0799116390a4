"""Recipes × survey → advice: what each recipe would do to a network, and which one to take for what.

The network is looked at once. A recipe that cannot be planned here is a row that says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType

from surgeon.analysis.sites import Survey
from surgeon.display.advice import advice_data, advice_view
from surgeon.display.shown import Shown
from surgeon.errors import PassError, PlanError, SurgeonError
from surgeon.models.cost import Cost
from surgeon.models.progress import Progress, silent
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.foresee import foresee
from surgeon.surgery.make import make
from surgeon.surgery.plan import Change, Gained, Plan

_NAMES = re.compile(r"[\w.×]*\d[\w.×]*")  # with a number in them: stages.0.0, 4×4
WORTH = 0.95  # of the multiply-adds: a recipe that leaves more than that saves next to nothing


@dataclass(frozen=True, slots=True)
class Offer:
    """What one recipe would do to the network."""

    recipe: str
    title: str
    swapped: int = 0
    keeps_function: bool = False
    exact: int = 0  # how many swaps keep it in train mode, too
    gained: Gained | None = None  # before, and once converted and fused; None where nothing is swapped
    training: Change | None = None  # multiply-adds before, and as it is trained
    why: str | None = None  # why most of the other convs stay
    stay: int = 0  # how many do so for that reason
    error: str | None = None  # why there is no plan

    @property
    def saves(self) -> float:
        """The share of the multiply-adds that is left once the network is fused."""
        macs = self.gained.macs if self.gained else None
        return macs.after / macs.before if macs and macs.before else 1.0

    @property
    def is_free(self) -> bool:
        """Whether it keeps the function, and what is deployed is no dearer than the network as it is."""
        return self.keeps_function and bool(self.gained and self.gained.is_folded) and self.saves <= 1


@dataclass(frozen=True, slots=True)
class Advice(Shown):
    """What every recipe would do to one network."""

    offers: tuple[Offer, ...]
    convs: int
    cost: Cost  # of the network as it is
    input: str | None  # that multiply-adds are counted at

    @property
    def free(self) -> Offer | None:
        """The recipe that strengthens most convs, exactly in train mode too, and adds nothing to what is deployed."""
        found = [one for one in self.offers if one.is_free]
        return min(found, key=lambda one: (-one.exact, one.swapped, one.recipe), default=None)

    @property
    def saves_most(self) -> Offer | None:
        """The recipe that leaves the smallest share of the multiply-adds, if any leaves less than nearly all."""
        found = [one for one in self.offers if one.saves < WORTH]
        return min(found, key=lambda one: one.saves, default=None)

    def __rich__(self) -> RenderableType:
        return advice_view(self)

    def to_dict(self) -> dict[str, object]:
        """Give plain data."""
        return advice_data(self)


def advise(survey: Survey, recipes: Sequence[Recipe], *, seed: int = 0, progress: Progress = silent) -> Advice:
    """Plan every recipe on one network."""
    offers = []
    for i, recipe in enumerate(recipes):
        progress(f"planning {recipe.name}", i / len(recipes))
        offers.append(_offer(recipe, survey, seed))
    return Advice(tuple(offers), len(survey.sites), survey.cost, str(survey.inputs) if survey.inputs else None)


def _offer(recipe: Recipe, survey: Survey, seed: int) -> Offer:
    try:
        plan = foresee(make(recipe, survey, seed=seed), survey)
    except PassError:
        raise
    except SurgeonError as error:
        is_for_others = isinstance(error, PlanError) and "rule" in error.facts
        problem = "there is no conv of the kind that it is for" if is_for_others else error.problem
        return Offer(recipe.name, recipe.title, error=problem)
    why, stay = _main_reason(recipe, plan)
    if not plan.swaps:
        return Offer(recipe.name, recipe.title, why=why, stay=stay)
    return Offer(
        recipe.name,
        recipe.title,
        swapped=len(plan.swaps),
        keeps_function=plan.keeps_function,
        exact=sum(entry.keeps_function and entry.note is None for entry in plan.swaps),
        gained=plan.gained,
        training=plan.total.macs,
        why=why,
        stay=stay,
    )


def _main_reason(recipe: Recipe, plan: Plan) -> tuple[str | None, int]:
    """Give the reason why most convs stay that the recipe would swap; why most stay, if it swaps all that it would.

    Reasons that differ only in names and numbers are one; the first of them is given.
    """
    wanted = {str(rule) for rule in recipe.rules if rule.swap is not None}
    stay = [entry for entry in plan.convs if entry.skip]
    alike: dict[str, list[str]] = {}
    for entry in [one for one in stay if one.rule in wanted] or stay:
        alike.setdefault(_NAMES.sub("…", entry.skip or ""), []).append(entry.skip or "")
    most = max(alike.values(), key=len, default=[])
    return (most[0] if most else None), len(most)
