"""recipe × sites → plan: for every conv what will be done to it, or the reason why nothing is. Touches no tensor.

A plan is a file too (YAML or JSON): it can be printed, pruned by hand, and applied exactly.
"""

from __future__ import annotations

import difflib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import Field, GetCoreSchemaHandler, ValidationError, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema
from rich.console import RenderableType

from surgeon.analysis import fingerprint as fingerprints
from surgeon.analysis.sites import Site, Survey, measure_calls
from surgeon.blocks import Block, BlockOptions, Together, Wanted, registry
from surgeon.blocks.two_streams import TwoStreamBlock
from surgeon.conv.spec import ConvSpec
from surgeon.display.plan import plan_view
from surgeon.display.shown import Shown
from surgeon.errors import BlockError, CaptureError, PlanError
from surgeon.models import call as calls
from surgeon.models.call import Inputs
from surgeon.models.cost import Cost
from surgeon.octave.roles import Roles
from surgeon.recipes import forms
from surgeon.recipes import marks as yamlmarks
from surgeon.recipes.forms import Form
from surgeon.recipes.match import Subject
from surgeon.recipes.recipe import Recipe, Rule, text_of

_NO_RULE = "no rule claims it"
_COSTS = ("params", "macs", "activations")


class Change(Form):
    """A number before and after; for a conv over all its calls, with its norm where the block takes that over."""

    before: int
    after: int


class Step(Form):
    """A functional convolution that becomes a module: its step in the graph of an island, and its parameters there."""

    island: str
    step: str
    spec: ConvSpec
    weight: str
    bias: str = ""


class FieldsOrWords:
    """How a plan has a conv: its fields, but for those that have their default; or words.

    Words are the geometry in format 1, and in any format the class of what is no Conv2d.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, fields: value if isinstance(value, str) else fields(value),
            handler.generate_schema(ConvSpec),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value if isinstance(value, str) else value.to_dict()
            ),
        )


class Entry(Form):
    """What happens to one conv: it is swapped (`swap`), or it is not (`skip`, a reason)."""

    path: str
    aliases: tuple[str, ...] = ()  # further names of the same module
    spec: Annotated[ConvSpec | str, FieldsOrWords()] = Field(alias="conv")  # a plan fits only a conv that has the same
    functional: Step | None = None
    calls: int | None = None
    size: tuple[int, int] | None = None  # of the input
    rule: str | None = None
    swap: str | None = None
    options: dict[str, Any] = Field(default_factory=dict, alias="with")
    takes_norm: tuple[str, ...] = ()  # all names of the norm that the block takes over
    note: str | None = None
    skip: str | None = None
    params: Change | None = None
    macs: Change | None = None
    activations: Change | None = None  # bytes that are written
    ideal_macs: int | None = None  # after the swap, as the block's paper counts them, where that is less than executed
    kept_energy: dict[str, float] | None = None  # of a conv that is thinned out, by each way in which that can be done

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.swap is None) == (self.skip is None):
            raise ValueError("needs either swap (a block) or skip (a reason)")
        if self.swap is not None and self.swap not in registry():
            raise ValueError(f"no block called {self.swap!r}; there are {', '.join(registry())}")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @property
    def conv(self) -> str:
        """Its geometry in words."""
        return str(self.spec)

    @property
    def block(self) -> type[Block]:
        assert self.swap is not None
        return registry()[self.swap]

    @property
    def block_options(self) -> BlockOptions:
        return self.block.Options.model_validate(self.options)

    @property
    def keeps_function(self) -> bool:
        return self.swap is None or self.block.keeps_function(self.block_options)


class _Dumper(yamlmarks.Dumper):
    """Writes convs and lists of numbers on one line, and texts of several lines as blocks: users edit them."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style="c_in" in mapping or flow_style)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        is_flat = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=is_flat or flow_style)

    def represent_text(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


class RecipeText(Form):
    """The recipe that a plan was made from, as it was written, and what `--set` changed in it."""

    name: str
    text: str
    overrides: tuple[str, ...] = ()


class Total(Form):
    """Of the whole model; MACs and bytes of activations for one run with the plan's input."""

    params: Change
    macs: Change | None = None
    activations: Change | None = None
    ideal_macs: int | None = None


class LowPassed(Form):
    """A map that is low-passed where it is added to an octave one; take the entry out, and it is a seam there."""

    island: str
    step: str
    operand: str


class SeamLeft(Form):
    """A place where two streams have to be joined or split, and why; `local`: an island that stays conv by conv."""

    island: str
    kind: Literal["join", "split", "local"]
    reason: str


class Plan(Shown, Form):
    """What will be done to one model, conv by conv."""

    format: Literal[1, 2] = Field(alias="surgeon-plan")
    model: str  # fingerprint of the architecture
    input: tuple[tuple[int, ...], ...] | str | None = None  # shapes of positional tensors, or text as --input takes it
    seed: int = 0
    recipe: RecipeText
    total: Total
    rewritten: tuple[str, ...] = ()  # islands that become graphs, so that octave streams go from conv to conv
    low_passed: tuple[LowPassed, ...] = ()
    seams: tuple[SeamLeft, ...] = ()
    convs: tuple[Entry, ...]

    @field_validator("input")
    @classmethod
    def _is_readable(cls, value: tuple[tuple[int, ...], ...] | str | None) -> tuple[tuple[int, ...], ...] | str | None:
        try:
            calls.recall(value)
        except CaptureError as error:
            raise ValueError(error.problem) from error
        return value

    @property
    def inputs(self) -> Inputs | None:
        """The call that the numbers are for, its tensors still to be drawn."""
        return calls.recall(self.input)

    @property
    def stream_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that hand two streams on."""
        return tuple(sorted({str(entry.swap) for entry in self.swaps if issubclass(entry.block, TwoStreamBlock)}))

    @property
    def has_streams(self) -> bool:
        return bool(self.stream_blocks)

    @property
    def swaps(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.convs if entry.swap is not None)

    @property
    def keeps_function(self) -> bool:
        return all(entry.keeps_function for entry in self.convs)

    def __rich__(self) -> RenderableType:
        return plan_view(self)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data, without what goes without saying."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def dump(self, *, as_json: bool = False) -> str:
        """Write the plan as YAML, or as JSON; `read` reads both."""
        if as_json:
            return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def make(recipe: Recipe, survey: Survey, *, seed: int = 0) -> Plan:
    """Decide for every conv.

    Raises:
        PlanError: a rule that is not optional claims no conv.
    """
    if survey.inputs is None and (sized := [rule for rule in recipe.rules if rule.match.needs_size]):
        raise PlanError(
            f"{sized[0]} asks for the size of feature maps, and no input is known",
            todo="Give one: --input 1,3,224,224.",
        )
    claims = [next((rule for rule in recipe.rules if _claims(rule, site)), None) for site in survey.sites]
    for rule in recipe.rules:
        if not rule.optional and not any(rule is claim for claim in claims):
            _refuse_idle_rule(rule, survey)
    measured, claimed = _Measured(), list(zip(survey.sites, claims, strict=True))
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


def read(source: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        RecipeError: every fault of the file, with file:line:column.
    """
    path = Path(source)
    return parse(text_of(path), path.name)


def parse(text: str, name: str) -> Plan:
    """Read a plan from text; `name` stands in the positions of faults."""
    return forms.validate(Plan, yamlmarks.read(text, name, todo=_HOW_TO_PLAN), todo=_HOW_TO_PLAN)


_HOW_TO_PLAN = "`surgeon plan MODEL --recipe acnet -o plan.yaml` writes one that works."


def check(plan: Plan, survey: Survey) -> None:
    """Make sure that a plan, perhaps edited by hand, can be carried out on this model as it stands.

    Raises:
        PlanError: what does not fit; all of it.
    """
    if not fingerprints.fits(plan.model, survey.model):
        raise PlanError(
            f"the plan is for another network ({plan.model}; this one is {survey.fingerprint})",
            todo="Make one for this network: surgeon plan MODEL --recipe … -o plan.yaml.",
        )
    sites = {site.path: site for site in survey.sites}
    misfits = [f"{entry.path}: {why}" for entry in plan.convs if (why := _misfit(entry, sites.get(entry.path)))]
    seen = [entry.path for entry in plan.convs]
    steps = {(island.path, node.name) for island in survey.network.islands for node in island.graph.nodes}
    misfits += [
        f"low_passed {one.step}: there is no such step that reads {one.operand}"
        for one in plan.low_passed
        if not {(one.island, one.step), (one.island, one.operand)} <= steps
    ]
    misfits += [f"{path}: it stands in the plan twice" for path in sorted({p for p in seen if seen.count(p) > 1})]
    if misfits:
        raise PlanError(
            "the plan cannot be carried out as it stands:\n  " + "\n  ".join(misfits),
            todo="Give these convs `skip: reason` instead of `swap`, or take them out of the plan.",
        )


def _misfit(entry: Entry, site: Site | None) -> str | None:
    if site is None:
        return "there is no such conv"
    if entry.swap is None:
        return None
    if entry.functional != _step(site):
        return "it is another step of the network"
    if site.spec is None or entry.spec not in (site.spec, fingerprints.words_of(site.spec)):
        return f"the plan says {entry.conv}, the model has {site.spec or site.kind}"
    if set(entry.paths) != set(site.paths):
        return f"its names are {', '.join(site.paths)}"
    try:
        options = entry.block_options
    except ValidationError as error:
        return "; ".join(f"with.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    if entry.takes_norm and set(entry.takes_norm) != set(site.norm):
        return f"it cannot take over {entry.takes_norm[0]}" + (f": {site.norm_obstacle}" if site.norm_obstacle else "")
    return site.obstacle or entry.block.refusal(site.spec, site.size, options)


def _claims(rule: Rule, site: Site) -> bool:
    """Whether a rule claims a conv; only a Conv2d can be meant, and a size must be known to be judged."""
    if site.spec is None or (rule.match.needs_size and site.size is None):
        return False
    return rule.match.claims(Subject(site.paths, site.spec, site.size, site.readers))


def _refuse_idle_rule(rule: Rule, survey: Survey) -> None:
    """Say why a rule that had to claim something did not."""
    late = [site.path for site in survey.sites if _claims(rule, site)]
    if not survey.sites:
        held = ", ".join(f"{count} {name}" for name, count in survey.blocks.items())
        problem = f"{rule} claims no conv: " + (f"the model holds {held} already" if held else "the model has none")
        todo = "Start from the model as it was before." if held else "There is nothing to swap in it."
    elif late:
        problem = f"{rule} claims no conv: {', '.join(late[:3])} went to an earlier rule"
        todo = "Move it up, or say `optional: true`."
    else:
        near = _nearest(rule, [path for site in survey.sites for path in site.paths])
        problem = f"{rule} claims no conv" + (f"; the nearest names are {', '.join(near)}" if near else "")
        convs = "the one conv" if len(survey.sites) == 1 else f"all {len(survey.sites)} convs"
        todo = f"`surgeon survey MODEL` lists {convs}; with `optional: true` the rule may be idle."
    raise PlanError(problem, todo=todo, rule=rule)


def _nearest(rule: Rule, paths: list[str]) -> list[str]:
    patterns = (*rule.match.names, rule.match.regex)
    found = [near for pattern in patterns for near in difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)]
    return list(dict.fromkeys(found or paths))[:3] if any(patterns) else []


def _planned_together(survey: Survey, claimed: Sequence[tuple[Site, Rule | None]]) -> Roles:
    """Ask the planners of blocks whose convs have to know of each other."""
    wanted: dict[str, dict[str, Wanted]] = {}
    for site, rule in claimed:
        if rule is None or rule.swap is None or rule.options is None or site.obstacle is not None:
            continue
        block = registry()[rule.swap]
        if block.planner is not None:
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
    except Exception as error:  # importing runs a package; what it raises is its own affair
        raise BlockError(
            f"{name}, which a block names as its planner, cannot be imported: {error}",
            todo="Mend the distribution that brings the block, or uninstall it.",
        ) from error
    return found


def _entry(site: Site, rule: Rule | None, roles: Roles, measured: _Measured, weight: torch.Tensor | None) -> Entry:
    facts: dict[str, Any] = {
        "path": site.path,
        "aliases": site.paths[1:],
        "conv": site.spec or site.kind,
        "functional": _step(site),
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
    block = registry()[rule.swap]
    takes_norm = site.norm if block.takes_norm(options) else ()
    before = site.cost + site.norm_cost if takes_norm else site.cost
    facts |= {
        "swap": rule.swap,
        "with": options.model_dump(exclude_none=True),
        "takes_norm": takes_norm,
        "note": block.note(options, site.norm_obstacle),
    }
    after = measured.block(site, rule.swap, options, takes_norm=bool(takes_norm))
    assert site.spec is not None
    if weight is not None and not weight.is_meta and (kept := block.kept_energy(weight, options)):
        facts["kept_energy"] = {way: round(share, 4) for way, share in kept.items()}
    if (share := block.ideal_share(site.spec, options)) is not None and site.cost.macs is not None:
        facts["ideal_macs"] = round(share * site.cost.macs)
    return Entry.model_validate(facts | _changes(before, after))


def _step(site: Site) -> Step | None:
    one = site.functional
    if one is None or one.spec is None:
        return None
    return Step(island=one.island, step=one.step, spec=one.spec, weight=one.weight, bias=one.bias)


def _skip(site: Site, rule: Rule | None, roles: Roles) -> str | None:
    """Say why a conv stays as it is, or None if it is swapped."""
    if site.spec is None:
        return site.obstacle
    if rule is None:
        return _NO_RULE
    if rule.leave is not None:
        return rule.leave
    assert rule.swap is not None
    assert rule.options is not None
    if why := site.obstacle or roles.skips.get(site.path):
        return why
    return registry()[rule.swap].refusal(site.spec, site.size, roles.options.get(site.path, rule.options))


def _changes(before: Cost, after: Cost) -> dict[str, Change]:
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _COSTS}
    return {name: Change(before=one, after=other) for name, (one, other) in pairs.items() if None not in (one, other)}


def _total(cost: Cost, entries: Iterable[Entry]) -> Total:
    """Add what the swaps change to what the model costs."""
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
    """Costs of blocks, built on the meta device; alike convs are measured once."""

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
            block = registry()[swap].from_conv(conv, options, norm=norm, generator=torch.Generator())
            self._known[key] = measure_calls(block, site.runs)
        return self._known[key]
