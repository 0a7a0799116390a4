"""recipe × survey → plan: decide for every conv what will be done to it, and count what that costs.

A plan that was edited is counted anew. None of this changes a tensor of the network.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from surgeon.analysis.example import PASS_ONE
from surgeon.analysis.sites import Site, Survey, measure_calls
from surgeon.blocks import BlockOptions, Together, Wanted, contract, registry
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.errors import BlockError, PlanError
from surgeon.models.call import Inputs
from surgeon.models.cost import Cost
from surgeon.octave.region import Roles
from surgeon.recipes.match import Subject
from surgeon.recipes.recipe import Recipe, Rule
from surgeon.surgery import give_back
from surgeon.surgery.plan import Change, Entry, FunctionalStep, LowPassed, Plan, RecipeText, Total

_NO_RULE = "no rule claims it"
_NOT_IN_PLAN = "it is not in the plan"
_COSTS = ("params", "macs", "activations")
_COUNTED = (*_COSTS, "ideal_macs", "kept_energy", "note")


def make(
    recipe: Recipe, survey: Survey, *, seed: int = 0, chosen: Mapping[str, BlockOptions | str] | None = None
) -> Plan:
    """Decide for every conv whether and how it is swapped.

    `chosen` has, by path, the options of convs that have others than their rule gives them, or why they stay.

    Raises:
        PlanError: a rule that is not optional claims no conv.
    """
    if survey.inputs is None and (sized := [rule for rule in recipe.rules if rule.match.needs_size]):
        raise PlanError(
            f"{sized[0]} asks for the size of feature maps, but no input is known",
            todo=PASS_ONE,
        )
    claims = [next((rule for rule in recipe.rules if _claims(rule, site)), None) for site in survey.sites]
    for rule in recipe.rules:
        if not rule.optional and not any(rule is claim for claim in claims):
            _refuse_idle_rule(rule, survey)
    rules = [_with_choice(rule, (chosen or {}).get(site.path)) for site, rule in zip(survey.sites, claims, strict=True)]
    measured, claimed = _Measured(), list(zip(survey.sites, rules, strict=True))
    roles = _planned_together(survey, claimed)
    entries = [_entry(site, rule, roles, measured, survey.weights.get(site.path)) for site, rule in claimed]
    return Plan.model_validate(
        {
            "surgeon-plan": 2,
            "model": survey.fingerprint,
            "input": survey.inputs.record if survey.inputs else None,
            "seed": seed,
            "recipe": RecipeText(name=recipe.name, text=recipe.text, overrides=recipe.overrides),
            "total": _total(survey.cost, entries),
            "low_passed": [LowPassed.model_validate(asdict(one)) for one in roles.low_passes],
            "convs": entries,
        }
    )


def on_a_guess(inputs: Inputs, *planned_with: Recipe) -> str:
    """Say what plans take from an input that nobody gave, and how to give it."""
    rules = [rule for recipe in planned_with for rule in recipe.rules]
    sized = [f"`size` of {rule}" for rule in rules if rule.match.needs_size]
    planned = {str(rule.swap) for rule in rules if isinstance(rule.options, TwoStreamOptions)}
    sized += [f"`min_size` of {block}" for block in sorted(planned)]
    what = " and ".join([*sized, "all costs"])
    is_image = not inputs.kwargs and [len(shape) for shape in inputs.shapes] == [4]
    like = f"{','.join(map(str, inputs.shapes[0][:2]))},H,W" if is_image else inputs.text
    guess = f"{what} are for {inputs}, a guess that the model accepts"
    return f"no --input was given; {guess}. If yours is another, pass --input {like} (from Python, example=)"


def _claims(rule: Rule, site: Site) -> bool:
    """Whether a rule claims a conv; only a Conv2d can be claimed, and a rule about sizes needs to know the size."""
    if site.spec is None or (rule.match.needs_size and site.size is None):
        return False
    return rule.match.claims(Subject(site.paths, site.spec, site.size, site.readers))


def _with_choice(rule: Rule | None, chosen: BlockOptions | str | None) -> Rule | None:
    """Give a rule as it is for one conv."""
    if rule is None or rule.swap is None or chosen is None:
        return rule
    if isinstance(chosen, str):
        return replace(rule, swap=None, options=None, leave=chosen)
    return replace(rule, options=chosen)


def _refuse_idle_rule(rule: Rule, survey: Survey) -> None:
    """Say why a rule that had to claim something did not."""
    late = [site.path for site in survey.sites if _claims(rule, site)]
    if not survey.sites:
        held = ", ".join(f"{count} {name}" for name, count in survey.blocks.items())
        problem = f"{rule} claims no conv: " + (f"the model holds {held} already" if held else "the model has none")
        todo = "Start from the model as it was before." if held else "There is nothing to swap in it."
    elif late:
        problem = f"{rule} claims no conv: {', '.join(late[:3])} went to an earlier rule"
        todo = "Move the rule up, or set `optional: true`."
    else:
        near = _nearest(rule, [path for site in survey.sites for path in site.paths])
        problem = f"{rule} claims no conv" + (
            f"; the nearest {'name is' if len(near) == 1 else 'names are'} {', '.join(near)}" if near else ""
        )
        convs = "the one conv" if len(survey.sites) == 1 else f"all {len(survey.sites)} convs"
        todo = f"`surgeon survey MODEL` lists {convs}; with `optional: true` the rule may claim none."
    raise PlanError(problem, todo=todo, rule=rule)


def _nearest(rule: Rule, paths: list[str]) -> list[str]:
    patterns = (*rule.match.names, rule.match.regex)
    found = [near for pattern in patterns for near in difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)]
    return list(dict.fromkeys(found or paths))[:3] if any(patterns) else []


def _planned_together(survey: Survey, claimed: Sequence[tuple[Site, Rule | None]]) -> Roles:
    """Ask the planners of those blocks whose convs have to be planned together."""
    wanted: dict[str, dict[str, Wanted]] = {}
    for site, rule in claimed:
        if rule is None or rule.swap is None or rule.options is None or site.obstacle is not None:
            continue
        block = registry()[rule.swap]
        if block.planner is not None and give_back.refusal(site, block, takes_norm=False) is None:
            wanted.setdefault(block.planner, {})[site.path] = Wanted(block, rule.options)
    roles = Roles()
    for planner, theirs in wanted.items():
        made = _planner(planner)(survey, theirs)
        roles.options |= made.options
        roles.skips |= made.skips
        roles.low_passes += made.low_passes if isinstance(made, Roles) else []
    return roles


def _planner(name: str) -> Callable[[Survey, Mapping[str, Wanted]], Together]:
    try:
        found: Callable[[Survey, Mapping[str, Wanted]], Together] = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs the code of a package, which may raise anything
        raise BlockError(
            f"{name}, which a block names as its planner, cannot be imported: {error}",
            todo="Fix the distribution that provides the block, or uninstall it.",
        ) from error
    return found


def _entry(site: Site, rule: Rule | None, roles: Roles, measured: _Measured, weight: torch.Tensor | None) -> Entry:
    facts: dict[str, Any] = {
        "path": site.path,
        "aliases": site.paths[1:],
        "conv": site.spec or site.kind,
        "functional": FunctionalStep.of(site),
        "calls": site.calls,
        "size": site.size,
        "rule": str(rule) if rule else None,
    }
    if skip := _skip(site, rule, roles):
        return Entry.model_validate(facts | {"skip": skip} | _changes(site.cost, site.cost))
    assert rule is not None
    assert rule.swap is not None
    options = roles.options.get(site.path, rule.options)
    assert options is not None
    takes_norm = site.norm if registry()[rule.swap].takes_norm(options) else ()
    return Entry.model_validate(facts | _swapped(site, rule.swap, options, takes_norm, measured, weight))


def _swapped(
    site: Site,
    swap: str,
    options: BlockOptions,
    takes_norm: tuple[str, ...],
    measured: _Measured,
    weight: torch.Tensor | None,
) -> dict[str, Any]:
    """Say what a swap is and what it costs."""
    assert site.spec is not None
    block = registry()[swap]
    left = site.norm and not takes_norm and block.takes_norm(options)
    facts: dict[str, Any] = {
        "swap": swap,
        "with": options.model_dump(exclude_none=True),
        "takes_norm": takes_norm,
        "note": block.note(options, f"takes_norm does not name {site.norm[0]}" if left else site.norm_obstacle),
    }
    if weight is not None and not weight.is_meta and (kept := block.kept_energy(weight, options)):
        facts["kept_energy"] = {way: round(share, 4) for way, share in kept.items()}
    if (share := block.ideal_share(site.spec, options)) is not None and site.cost.macs is not None:
        facts["ideal_macs"] = round(share * site.cost.macs)
    before = site.cost + site.norm_cost if takes_norm else site.cost
    return facts | _changes(before, measured.block(site, swap, options, takes_norm=bool(takes_norm)))


def recount(plan: Plan, survey: Survey) -> Plan:
    """Count anew what a checked plan costs, since it may have been edited; what it does stays as it is.

    A conv that was taken out of the plan stays, and is listed with that reason.
    """
    entries, measured = {entry.path: entry for entry in plan.convs}, _Measured()
    convs = [_recounted(entries.get(site.path), site, measured, survey) for site in survey.sites]
    fields: dict[str, Any] = {"convs": tuple(convs), "total": _total(survey.cost, convs), "time": None, "budget": None}
    if survey.inputs is not None:
        fields["input"] = survey.inputs.record
    return plan.model_copy(update=fields)


def _recounted(entry: Entry | None, site: Site, measured: _Measured, survey: Survey) -> Entry:
    facts: dict[str, Any] = {"calls": site.calls, "size": site.size} | dict.fromkeys(_COUNTED)
    if entry is None:
        named = {"path": site.path, "aliases": site.paths[1:], "functional": FunctionalStep.of(site)}
        facts |= named | {"conv": site.spec or site.kind, "skip": _NOT_IN_PLAN} | _changes(site.cost, site.cost)
        return Entry.model_validate(facts)
    if entry.swap is None:
        facts |= _changes(site.cost, site.cost)
    else:
        weight = survey.weights.get(site.path)
        facts |= _swapped(site, entry.swap, entry.block_options, entry.takes_norm, measured, weight)
        facts["options"] = facts.pop("with")
    return entry.model_copy(update=facts)


def _skip(site: Site, rule: Rule | None, roles: Roles) -> str | None:
    """Say why a conv stays as it is; return None if it is swapped."""
    if site.spec is None:
        return site.obstacle
    if rule is None:
        return _NO_RULE
    if rule.leave is not None:
        return rule.leave
    assert rule.swap is not None
    assert rule.options is not None
    block = registry()[rule.swap]
    if why := site.obstacle or roles.skips.get(site.path):
        return why
    options = roles.options.get(site.path, rule.options)
    if (why := contract.refusal(block, site.spec, site.size, options)) is not None:
        return why
    takes_norm, leaves_norm = block.takes_norm(options) and bool(site.norm), block.leaves_norm(options)
    return give_back.refusal(site, block, takes_norm=takes_norm, leaves_norm=leaves_norm)


def _changes(before: Cost, after: Cost) -> dict[str, Change]:
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _COSTS}
    return {name: Change(before=one, after=other) for name, (one, other) in pairs.items() if None not in (one, other)}


def _total(cost: Cost, entries: Iterable[Entry]) -> Total:
    """Give the costs of the model before and after the swaps."""
    swaps = [entry for entry in entries if entry.swap is not None]
    changes: dict[str, Any] = {}
    for name in _COSTS:
        made = [change for entry in swaps if (change := getattr(entry, name)) is not None]
        if (before := getattr(cost, name)) is not None:
            changes[name] = Change(before=before, after=before + sum(one.after - one.before for one in made))
    unexecuted = [entry.macs.after - entry.ideal_macs for entry in swaps if entry.macs and entry.ideal_macs]
    if unexecuted and cost.macs is not None:
        changes["ideal_macs"] = changes["macs"].after - sum(unexecuted)
    return Total.model_validate(changes)


class _Measured:
    """Costs of blocks, built on the meta device; equal convs are measured once."""

    def __init__(self) -> None:
        self._known: dict[object, Cost] = {}

    def block(self, site: Site, swap: str, options: BlockOptions, *, takes_norm: bool) -> Cost:
        assert site.spec is not None
        key = (site.spec, swap, options, takes_norm, site.runs, site.dtype)
        if key not in self._known:
            with torch.device("meta"):
                like = torch.empty(0, dtype=site.dtype)
                norm = torch.nn.BatchNorm2d(site.spec.c_out, dtype=site.dtype) if takes_norm else None
            conv = site.spec.build(like=like)
            block = contract.from_conv(registry()[swap], conv, options, norm=norm, generator=torch.Generator())
            self._known[key] = measure_calls(block, site.runs)
        return self._known[key]
