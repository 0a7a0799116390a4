"""Whether a plan is worth it: a sentence for one whose blocks are meant to save multiply-adds, and save hardly any.

It says which reason keeps most of the multiply-adds of convs where they are, and what would change that.
"""

from __future__ import annotations

import re

from surgeon.blocks import Block, registry
from surgeon.display import words
from surgeon.errors import SurgeonError
from surgeon.recipes import recipe as recipes
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.plan import Entry, Plan

_NUMBER = re.compile(r"\d+(, \d+)*")
LEAST = 0.05  # of the multiply-adds, which a plan should save


def saves_little(plan: Plan) -> str | None:
    """Say why a plan saves less than it should; None if it saves enough, was not meant to, or is not known to."""
    total, recipe = plan.gained.macs, _recipe(plan)
    names = {entry.swap for entry in plan.swaps} or {rule.swap for rule in recipe.rules if rule.swap} if recipe else ()
    blocks = [registry()[name] for name in names if name]
    if total is None or not total.before or not blocks or not all(block.is_cheaper for block in blocks):
        return None
    saved = 1 - total.after / total.before
    if saved >= LEAST:
        return None
    share = sum(entry.macs.before for entry in plan.convs if entry.macs) / total.before
    if share < 2 * LEAST:
        others = "the others are in linear layers and matrix products, which no swap of convs changes"
        return f"{_saves(saved)}: its convs do {100 * share:.0f} % of them; {others}"
    return f"{_saves(saved)}; {_main_reason(plan, blocks, recipe)}"


def _saves(share: float) -> str:
    if round(100 * share) > 0:
        return f"saves {100 * share:.0f} % of the multiply-adds"
    return f"adds {-100 * share:.0f} % to the multiply-adds" if round(100 * share) < 0 else "saves no multiply-adds"


def _main_reason(plan: Plan, blocks: list[type[Block]], recipe: Recipe | None) -> str:
    """Give the reason for which most multiply-adds of convs stay, and what would change that.

    Reasons that differ in numbers only are one reason.
    """
    stay: dict[str, list[Entry]] = {}
    for entry in plan.convs:
        if entry.skip is not None:
            stay.setdefault(_NUMBER.sub("#", entry.skip), []).append(entry)
    if not stay:
        return f"all {len(plan.convs)} convs are swapped, and each saves little; other options may save more"
    found = max(stay.values(), key=_macs)
    reason = str(max(found, key=lambda entry: _macs([entry])).skip)
    stays = "stays" if len(found) == 1 else "stay"
    said = f"{len(found)} of {words.convs(len(plan.convs))} {stays}: {reason}"
    return f"{said}; {_remedy(reason, found, blocks, recipe)}"


def _macs(entries: list[Entry]) -> int:
    return sum(entry.macs.before for entry in entries if entry.macs)


def _remedy(reason: str, entries: list[Entry], blocks: list[type[Block]], recipe: Recipe | None) -> str:
    rule = next((entry.rule for entry in entries if entry.rule), None)
    if rule is None:
        return "a rule of the recipe that claims them would change that"
    if recipe is not None and any(one.leave == reason for one in recipe.rules):
        return f"{rule} of the recipe says so"
    found = next((said for block in blocks if (said := block.remedy(reason))), None)
    return found or "`surgeon recipes --for MODEL` says what other recipes would bring"


def _recipe(plan: Plan) -> Recipe | None:
    """Read the recipe that a plan holds; None where this surgeon has no such block or option any more."""
    try:
        return recipes.parse(plan.recipe.text, plan.recipe.name, plan.recipe.overrides)
    except SurgeonError:
        return None
