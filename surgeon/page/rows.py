"""What becomes of every conv, and what that costs: the rows that several sections show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from surgeon.analysis.sites import Site, Survey
from surgeon.display import words
from surgeon.page.data import Looked, PageData
from surgeon.surgery.plan import Entry, Plan

State = Literal["planned", "swapped", "folded", "stays", "plain", "blocked"]
MARKS: Mapping[State, str] = {  # what tells the states apart besides colour
    "planned": "◇",
    "swapped": "◆",
    "folded": "●",
    "stays": "○",
    "plain": "○",
    "blocked": "×",
}
MEANINGS: Mapping[State, str] = {
    "planned": "will become a block",
    "swapped": "is a block",
    "folded": "was a block, and is folded",
    "stays": "stays as it is",
    "plain": "can be swapped",
    "blocked": "cannot be swapped",
}
Costs = Literal["macs", "params", "activations"]
UNITS: Mapping[Costs, str] = {"macs": "", "params": "", "activations": "B"}
TITLES: Mapping[Costs, str] = {"macs": "Multiply-adds", "params": "Parameters", "activations": "Activations"}


@dataclass(frozen=True, slots=True)
class Cost:
    """A number before and after; both are the same where nothing changes."""

    before: int
    after: int

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None


@dataclass(frozen=True, slots=True)
class Row:
    """One conv: what it is, what becomes of it and why, and what it costs before and after."""

    path: str
    geometry: str
    state: State
    becomes: str | None  # the name of a block
    why: str  # a sentence
    facts: tuple[tuple[str, str], ...]  # more about it: what it is called, and what that is
    costs: Mapping[Costs, Cost]

    @property
    def mark(self) -> str:
        return MARKS[self.state]

    @property
    def badge(self) -> str:
        """What happens to it in a few words."""
        said = {"planned": f"→ {self.becomes}", "swapped": str(self.becomes), "folded": f"{self.becomes}, folded"}
        return said.get(self.state) or {"stays": "stays", "plain": "conv"}.get(self.state, "cannot be swapped")


def rows(data: PageData) -> tuple[Row, ...]:
    """Give the convs of the model that the page shows, in their order."""
    shown = shown_model(data)
    if data.plan is not None:
        done = None if data.is_planned else shown
        return tuple(_planned(entry, data.plan, done) for entry in data.plan.convs)
    if shown is None or shown.survey is None:
        return ()
    return tuple(_surveyed(site, shown.survey) for site in shown.survey.sites)


def shown_model(data: PageData) -> Looked | None:
    """Choose the model whose modules are shown: the one to which most was done, where B was made from A."""
    if data.is_planned:
        return next(iter(data.models), None)
    with_history = [one for one in data.models if one.history]
    return max(with_history, key=lambda one: len(one.history), default=next(iter(data.models), None))


def _planned(entry: Entry, plan: Plan, shown: Looked | None) -> Row:
    """Describe a conv by what a plan says; if it was carried out, by what is at its place in the model `shown`, too."""
    state = _state(entry, shown)
    survey = _comparable(shown, plan) if state == "folded" else None
    return Row(
        entry.path,
        entry.conv,
        state,
        entry.swap,
        "; ".join(_reasons(entry, state)) + ".",
        tuple(_facts(entry, plan)),
        _costs(entry, state, survey),
    )


def _state(entry: Entry, shown: Looked | None) -> State:
    """Say what has become of a conv, by the plan and by what stands at its place in the model."""
    if entry.swap is None:
        return "stays"
    if shown is None:
        return "planned"
    is_block = entry.path in shown.blocks
    return "swapped" if is_block else "folded"


def _reasons(entry: Entry, state: State) -> Iterator[str]:
    """Say why, in the words of the plan."""
    if entry.swap is None:
        yield (entry.skip or "").rstrip(".")
        return
    block = entry.block
    done = {"planned": "Becomes", "swapped": "Became", "folded": "Became"}[state]
    yield f"{done} {entry.swap}: {block.title}"
    if state == "folded":
        yield "since then folded into what it costs least as"
    yield "computes the same at first" if entry.keeps_function else "computes something else, and has to be trained"
    if entry.takes_norm:
        yield f"takes over the norm {entry.takes_norm[0]}"
    if entry.note:
        yield entry.note.rstrip(".")


def _facts(entry: Entry, plan: Plan) -> Iterator[tuple[str, str]]:
    """Give what else is known of a conv."""
    if entry.size is not None:
        yield "input", words.size(entry.size)
    if entry.calls not in (None, 1):
        yield "calls in a run", str(entry.calls)
    if entry.aliases:
        yield "also named", ", ".join(entry.aliases)
    if entry.rule:
        yield "by", f"{entry.rule} of {plan.recipe.name}"
    if entry.options:
        yield "options", ", ".join(f"{name}: {value}" for name, value in entry.options.items())
    if entry.swap is not None and entry.kept_energy is not None:
        yield "keeps", entry.block.kept_in_words(entry.kept_energy, entry.block_options)
    if entry.ideal_macs is not None:
        yield "multiply-adds as the paper counts them", words.amount(entry.ideal_macs)
    for setting, loss in (entry.loses or {}).items():
        yield f"loses with {setting}", f"{loss:.2g}"


def _comparable(shown: Looked | None, plan: Plan) -> Survey | None:
    """Give the survey of a model if it was run with the plan's input, so that their costs can be compared."""
    survey = shown.survey if shown is not None else None
    return survey if survey is not None and str(survey.inputs) == str(plan.inputs) else None


def _costs(entry: Entry, state: State, survey: Survey | None) -> dict[Costs, Cost]:
    """Give what a conv costs before, and after: as the plan counts it, or as it is folded."""
    found: dict[Costs, Cost] = {}
    names: tuple[Costs, ...] = ("macs", "params", "activations")
    site = next((one for one in survey.sites if one.path == entry.path), None) if survey is not None else None
    for name in names:
        change = getattr(entry, name)
        if change is None:
            continue
        now = getattr(site.cost, name) if site is not None else None
        if now is None and state == "folded" and (made := entry.folded) is not None:
            macs = round(made.share * entry.macs.before) if entry.macs else None
            now = {"params": made.params, "macs": macs}.get(name)
            if now is None:  # how large maps are once folded was not counted
                continue
        found[name] = Cost(change.before, change.after if now is None else now)
    return found


def _surveyed(site: Site, survey: Survey) -> Row:
    """Describe a conv of which nothing is planned."""
    facts = [("input", words.size(site.size))] if site.size else []
    facts += [("also named", ", ".join(site.paths[1:]))] if site.paths[1:] else []
    facts += [("calls in a run", str(site.calls))] if site.calls not in (None, 1) else []
    facts += [("read by", ", ".join(site.readers))] if site.readers else []
    why = site.obstacle or (
        f"it can be swapped, but {site.norm_obstacle}" if site.norm_obstacle else "it can be swapped"
    )
    costs = {name: Cost(value, value) for name in TITLES if (value := getattr(site.cost, name)) is not None}
    geometry = str(site.spec) if site.spec is not None else site.kind
    state: State = "blocked" if site.obstacle else "plain"
    return Row(site.path, geometry, state, None, f"{why[0].upper()}{why[1:]}.", tuple(facts), costs)


def totals(data: PageData) -> dict[Costs, Cost]:
    """Give what the whole network costs before and after; of a network that was folded, as it is now."""
    shown = shown_model(data)
    if data.plan is None:
        cost = shown.survey.cost if shown is not None and shown.survey is not None else None
        found = {name: getattr(cost, name) for name in TITLES} if cost is not None else {}
        return {name: Cost(value, value) for name, value in found.items() if value is not None}
    survey = None if data.is_planned else _comparable(shown, data.plan)
    gained = data.plan.gained if is_folded(data) else None
    made: dict[Costs, Cost] = {}
    for name in TITLES:
        change = getattr(data.plan.total, name)
        now = getattr(survey.cost, name) if survey is not None else None
        if now is None and gained is not None:
            now = getattr(getattr(gained, name, None), "after", None)
        if change is None or (now is None and gained is not None):  # how large maps are once folded was not counted
            continue
        made[name] = Cost(change.before, change.after if now is None else now)
    return made


def is_folded(data: PageData) -> bool:
    """Whether the model that the page shows was fused in the end."""
    shown = shown_model(data)
    return not data.is_planned and shown is not None and [step.operation for step in shown.history][-1:] == ["fuse"]
