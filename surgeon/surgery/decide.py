"""A recipe or a plan, and a network → what is decided, and carried out; what a plan bakes is baked first."""

from __future__ import annotations

import logging

from surgeon.analysis import sites
from surgeon.analysis.fingerprint import fingerprint
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.errors import PlanError
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, silent
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.bake import bake_, bakeable, with_baked
from surgeon.surgery.check import check
from surgeon.surgery.convert import carry_out_
from surgeon.surgery.foresee import foresee
from surgeon.surgery.history import content_hash
from surgeon.surgery.make import make, on_a_guess, recount
from surgeon.surgery.plan import Plan
from surgeon.surgery.rank import Scores, with_permuted
from surgeon.surgery.selfcheck import SelfCheck

_log = logging.getLogger("surgeon")


def carry_out(
    how: Plan | Recipe,
    network: Network,
    *,
    bake: bool,
    seed: int,
    scores: Scores | None = None,
    progress: Progress = silent,
) -> tuple[Plan, SelfCheck]:
    """Carry out a plan, or the plan that a recipe leads to."""
    if isinstance(how, Plan):
        check_bakes(how, bake=bake)
        return _carry_out(how, network, progress)
    decided, _ = plan_for(network, how, bake=bake, seed=seed, scores=scores)
    if decided.baked:
        return _carry_out(decided, network, progress)
    return decided, carry_out_(decided, network, progress)


def check_bakes(plan: Plan, *, bake: bool) -> None:
    """Make sure that a plan bakes, if that is asked for beside it.

    Raises:
        PlanError: it was made without.
    """
    if bake and not plan.baked:
        raise PlanError("the plan bakes nothing", todo="Make one with surgeon plan --bake, or plan(bake=True).")


def plan_for(
    network: Network, recipe: Recipe, *, bake: bool, seed: int, scores: Scores | None = None
) -> tuple[Plan, Survey]:
    """Make a plan for a network; with `bake`, for it as it is with the tensors of its convs baked. Gives both.

    `scores` say what each output channel of a conv loses when it becomes low; without them its kernel does.
    """
    found = bakeable(network.model) if bake else None
    if found is None or not (found.paths or found.reasons):
        surveyed = sites.survey(network)
        return decide(recipe, surveyed, seed=seed, scores=scores), surveyed
    bare = shadow(network.model)
    bake_(bare, found.paths)
    surveyed = sites.survey(Network(bare, network.inputs))
    decided = decide(recipe, surveyed, seed=seed, scores=scores)
    return with_baked(decided, found, fingerprint(network.model)), surveyed


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


def decide(recipe: Recipe, surveyed: Survey, *, seed: int, scores: Scores | None = None) -> Plan:
    """Make a plan, and add what it leads to; that it rests on a guessed input is logged."""
    decided = foresee(with_permuted(make(recipe, surveyed, seed=seed), surveyed, scores), surveyed)
    if surveyed.inputs is not None and surveyed.inputs.is_guess:
        _log.warning(on_a_guess(surveyed.inputs, recipe))
    return decided


def settle(plan: Plan, surveyed: Survey, given: str | None = None) -> Plan:
    """Make sure that a plan can be carried out on a model, and count anew what it leads to: it may have been edited.

    `given` is the fingerprint of the model before anything was baked.
    """
    check(plan, surveyed, given)
    return foresee(recount(plan, surveyed), surveyed)
