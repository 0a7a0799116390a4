"""Whether a plan, perhaps edited by hand or read from a file, can be carried out on a network as it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from surgeon.analysis import fingerprint as fingerprints
from surgeon.analysis.example import PASS_ONE
from surgeon.analysis.sites import Site, Survey
from surgeon.blocks import contract
from surgeon.channels.follow import channels_of
from surgeon.errors import PlanError
from surgeon.recipes.forms import plain_words
from surgeon.surgery import give_back
from surgeon.surgery.permute import NO_INPUT, TAKE_OUT, Permuted
from surgeon.surgery.plan import Entry, FunctionalStep, Plan

_SURVEY = "`surgeon survey MODEL` lists the names of all convs."
_ANEW = "`surgeon plan MODEL --recipe … -o plan.yaml` describes the convs as they are now."
_OPTIONS = "`surgeon blocks` lists the options of every block."
_NO_NORM = "Take `takes_norm` out of these entries."
_LOW_PASSED = "Take that entry out of `low_passed`: a seam stays there."
_STAY = "Give convs that cannot be swapped `skip: reason` instead of `swap`, or take them out of the plan."


def check(plan: Plan, survey: Survey, given: str | None = None, *, is_recorded: bool = False) -> None:
    """Make sure that a plan, perhaps edited by hand, can be carried out on this model as it stands.

    `given` is the fingerprint that the model had before what the plan bakes was baked. A plan that a history has
    recorded was carried out before; what is only unwise does not count then.

    Raises:
        PlanError: the plan does not fit; the message lists everything that is wrong.
    """
    if not (fingerprints.fits(plan.model, survey.model) if given is None else plan.model == given):
        raise PlanError(
            f"the plan is for another network ({plan.model}; this one is {given or survey.fingerprint})",
            todo="Make one for this network: surgeon plan MODEL --recipe … -o plan.yaml.",
        )
    unwise = [] if is_recorded else _unwise(plan, survey)
    misfits = [*_misfits(plan, survey), *unwise, *_lost_low_passes(plan, survey), *_repeated(plan)]
    misfits += [] if is_recorded else _wrong_orders(plan, survey)
    if misfits:
        raise PlanError(
            "the plan cannot be carried out as it stands",
            details=[f"{one.where}: {one.what}" for one in misfits],
            todo=" ".join(dict.fromkeys(one.todo for one in misfits)),
        )


@dataclass(frozen=True, slots=True)
class _Misfit:
    """What in a plan does not fit, and what to do about it."""

    where: str
    what: str
    todo: str


def _misfits(plan: Plan, survey: Survey) -> Iterator[_Misfit]:
    """Compare every entry with the conv that it names."""
    sites = {site.path: site for site in survey.sites}
    for entry in plan.convs:
        if (site := sites.get(entry.path)) is None:
            near = difflib.get_close_matches(entry.path, sites, n=3, cutoff=0.5)
            nearest = f"; the nearest {'name is' if len(near) == 1 else 'names are'} {', '.join(near)}" if near else ""
            yield _Misfit(entry.path, f"there is no such conv{nearest}", _SURVEY)
        elif entry.swap is not None and (found := _misfit(entry, site, survey)) is not None:
            yield _Misfit(entry.path, *found)


def _unwise(plan: Plan, survey: Survey) -> Iterator[_Misfit]:
    """List swaps after which a module that folds itself would fold something else."""
    sites = {site.path: site for site in survey.sites}
    for entry in plan.swaps:
        site = sites.get(entry.path)
        if site is None or site.folds_itself is None:
            continue
        try:
            leaves_norm = entry.block.leaves_norm(entry.block_options)
        except ValidationError:  # which is a misfit of its own
            continue
        why = give_back.refusal(site, entry.block, takes_norm=bool(entry.takes_norm), leaves_norm=leaves_norm)
        if why is not None:
            yield _Misfit(entry.path, why, _STAY)


def _lost_low_passes(plan: Plan, survey: Survey) -> Iterator[_Misfit]:
    steps = {(island.path, node.name) for island in survey.network.islands for node in island.graph.nodes}
    for one in plan.low_passed:
        if not {(one.island, one.step), (one.island, one.operand)} <= steps:
            yield _Misfit(f"low_passed {one.step}", f"there is no such step that reads {one.operand}", _LOW_PASSED)


def _wrong_orders(plan: Plan, survey: Survey) -> Iterator[_Misfit]:
    """List permutations that are not of channels which share an order, at all of their places."""
    if not plan.permuted:
        return
    if survey.inputs is None:
        yield _Misfit("permuted", NO_INPUT, PASS_ONE)
        return
    groups = [group for group in channels_of(survey.network).groups if not group.fixed]
    free = {Permuted.of(group, range(group.size)).places for group in groups}
    seen: set[object] = set()
    for i, one in enumerate(plan.permuted):
        named = one.tensors[0].tensor if one.tensors else "no tensor"
        if one.places not in free:
            what = "is not an order of channels that can be permuted, with all its tensors"
        else:
            what = "is there twice" if one.places in seen else ""
        if what:
            yield _Misfit(f"permuted[{i}] ({named}, {len(one.order)} channels)", what, TAKE_OUT)
        seen.add(one.places)


def _repeated(plan: Plan) -> Iterator[_Misfit]:
    seen = [entry.path for entry in plan.convs]
    for path in sorted({path for path in seen if seen.count(path) > 1}):
        yield _Misfit(path, "it is in the plan twice", "Delete one of the two entries.")


def _misfit(entry: Entry, site: Site, survey: Survey) -> tuple[str, str] | None:
    """Say why a conv cannot be swapped as the plan says, and what to do about it."""
    if entry.functional != FunctionalStep.of(site):
        return "the plan names another step of the network for it", _ANEW
    if site.spec is None or entry.spec not in (site.spec, fingerprints.words_of(site.spec)):
        return f"the plan says {entry.conv}, the model has {site.spec or site.kind}", _ANEW
    if set(entry.paths) != set(site.paths):
        return f"the model names it {', '.join(site.paths)}", _ANEW
    try:
        with plain_words(entry.block.Options):
            options = entry.block_options
    except ValidationError as error:
        said = [(".".join(("with", *map(str, e["loc"]))), e["msg"]) for e in error.errors()]
        return "; ".join(f"{where}: {what}" for where, what in said), _OPTIONS
    if entry.takes_norm and not entry.block.takes_norm(options):
        return f"a block called {entry.swap} with these options takes over no norm", _NO_NORM
    if entry.takes_norm and set(entry.takes_norm) != set(site.norm):
        return _wrong_norm(entry, site, survey)
    why = site.obstacle or contract.refusal(entry.block, site.spec, site.size, options)
    return (why, _STAY) if why else None


def _wrong_norm(entry: Entry, site: Site, survey: Survey) -> tuple[str, str]:
    """Say why a block cannot take over what `takes_norm` names."""
    names = dict(survey.model.named_modules(remove_duplicate=False))
    unknown = [name for name in entry.takes_norm if name not in names]
    what = f"it cannot take over {(unknown or entry.takes_norm)[0]}" + (": there is no such module" if unknown else "")
    if site.norm:
        return f"{what}; its norm is {', '.join(site.norm)}", f"Write `takes_norm: [{', '.join(site.norm)}]`."
    return what + (f": {site.norm_obstacle}" if site.norm_obstacle and not unknown else ""), _NO_NORM
