"""A recipe or a plan, and a network → what is decided, and carried out; what a plan bakes is baked first."""

from __future__ import annotations

import logging

from surgeon.analysis import sites
from surgeon.analysis.fingerprint import fingerprint
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.errors import PlanError
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, silent
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.bake import bake_, bakeable, with_baked
from surgeon.surgery.check import check
from surgeon.surgery.convert import carry_out_
from surgeon.surgery.foresee import foresee
from surgeon.surgery.history import content_hash
from surgeon.surgery.make import make, recount
from surgeon.surgery.plan import Plan
from surgeon.surgery.selfcheck import SelfCheck

_log = logging.getLogger("surgeon")


def carry_out(
    how: Plan | Recipe, network: Network, *, bake: bool, seed: int, progress: Progress = silent
) -> tuple[Plan, SelfCheck]:
    """Carry out a plan, or the plan that a recipe leads to."""
    if isinstance(how, Plan):
        if bake and not how.baked:
            raise PlanError("the plan bakes nothing", todo="Make one with surgeon plan --bake, or plan(bake=True).")
        return _carry_out(how, network, progress)
    decided = plan_for(network, how, bake=bake, seed=seed)
    if decided.baked:
        return _carry_out(decided, network, progress)
    return decided, carry_out_(decided, network, progress)


def plan_for(network: Network, recipe: Recipe, *, bake: bool, seed: int) -> Plan:
    """Make a plan for a network; with `bake`, for it as it is with the tensors of its convs baked."""
    found = bakeable(network.model) if bake else None
    if found is None or not (found.paths or found.reasons):
        return decide(recipe, sites.survey(network), seed=seed)
    bare = shadow(network.model)
    bake_(bare, found.paths)
    decided = decide(recipe, sites.survey(Network(bare, network.inputs)), seed=seed)
    return with_baked(decided, found, fingerprint(network.model))


def _carry_out(how: Plan, network: Network, progress: Progress = silent) -> tuple[Plan, SelfCheck]:
    """Bake what a plan bakes, make sure that it fits, and carry it out; after an error, the model is as it was."""
    if not how.baked:
        decided = settle(how, sites.survey(network))
        return decided, carry_out_(decided, network, progress)
    model, given, parent = network.model, fingerprint(network.model), content_hash(network.model)
    undo = bake_(model, how.baked)
    try:
        network = Network(model, network.inputs)
        decided = settle(how, sites.survey(network), given)
        return decided, carry_out_(decided, network, progress, parent=parent)
    except BaseException:
        undo()
        raise


def decide(recipe: Recipe, surveyed: Survey, *, seed: int) -> Plan:
    """Make a plan, and add what it leads to; that it rests on a guessed input is logged."""
    decided = foresee(make(recipe, surveyed, seed=seed), surveyed)
    if surveyed.inputs is not None and surveyed.inputs.is_guess:
        _log.warning(_on_a_guess(recipe, surveyed.inputs))
    return decided


def settle(plan: Plan, surveyed: Survey, given: str | None = None) -> Plan:
    """Make sure that a plan can be carried out on a model, and count anew what it leads to: it may have been edited.

    `given` is the fingerprint of the model before anything was baked.
    """
    check(plan, surveyed, given)
    return foresee(recount(plan, surveyed), surveyed)


def _on_a_guess(recipe: Recipe, inputs: Inputs) -> str:
    """Say what a plan takes from an input that nobody gave, and how to give it."""
    sized = [f"`size` of {rule}" for rule in recipe.rules if rule.match.needs_size]
    planned = {str(rule.swap) for rule in recipe.rules if isinstance(rule.options, TwoStreamOptions)}
    sized += [f"`min_size` of {block}" for block in sorted(planned)]
    what = " and ".join([*sized, "all costs"])
    is_image = not inputs.kwargs and [len(shape) for shape in inputs.shapes] == [4]
    like = f"{','.join(map(str, inputs.shapes[0][:2]))},H,W" if is_image else inputs.text
    guess = f"{what} are for {inputs}, a guess that the model accepts"
    return f"no --input was given; {guess}. If yours is another, pass --input {like} (from Python, example=)"
