"""Which sites are worth it: a budget of multiply-adds, or of error at the outputs → the plan that loses least.

    loss of a plan ≈ Σ (relative error that each choice causes alone)²

since errors of different sites are nearly independent. What they are together is then measured on networks that are
fitted: the best choice by that sum, choices by corrected sums, and the best uniform ones; the plan is the one that is
nearest to the original on images that none of them was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from surgeon.analysis import sites
from surgeon.analysis.fingerprint import fingerprint
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.errors import PlanError
from surgeon.fitting import knapsack, states, units
from surgeon.fitting.data import Data
from surgeon.fitting.fit import How
from surgeon.fitting.identity import network_hash
from surgeon.fitting.knapsack import Table, Way
from surgeon.fitting.processes import ALONE, Processes
from surgeon.fitting.sensitivity import Trials, tried_levels
from surgeon.fitting.space import Choice, Space
from surgeon.models.copies import in_mode, shadow
from surgeon.models.progress import Progress, parts, silent
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.bake import bake_, bakeable, with_baked
from surgeon.surgery.foresee import foresee
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Budgeted, Plan
from surgeon.surgery.rank import with_permuted

_HOW = "Write --budget macs=0.6 for the share of multiply-adds, or error=0.05 for the relative error of the outputs."
_UNIFORM = 2  # uniform ways that are measured beside those that are chosen
_ROUNDS = 4  # networks that are fitted to find what an error leads to
_TRIES = 12  # choices until one costs what was counted for it
_POINTS = 40  # of the curve
_MOST_KNOWN = 8  # networks whose losses are remembered
_KNOWN: dict[str, list[list[float]]] = {}  # what settings lose, by all that it depends on


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan may cost (`macs`, a share of the multiply-adds), or how far it may move the outputs (`error`)."""

    kind: Literal["macs", "error"]
    limit: float

    def __str__(self) -> str:
        return f"{self.kind}={self.limit:g}"


@dataclass(frozen=True, slots=True)
class Point:
    """One network on the picture of the trade-off: its share of the multiply-adds, and its relative error."""

    kind: Literal["chosen", "predicted", "measured", "uniform", "alone"]
    macs: float
    error: float
    words: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan with what was measured for it, and all networks on the way."""

    plan: Plan
    points: tuple[Point, ...]


def parse(text: str) -> Budget:
    """Read a budget as the user writes it.

    >>> str(parse("macs=0.6"))
    'macs=0.6'

    Raises:
        PlanError: it is none.
    """
    kind, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if kind not in ("macs", "error") or not math.isfinite(limit):
        raise PlanError(f"{text!r} is not a budget", todo=_HOW)
    if not 0 < limit < (1 if kind == "macs" else math.inf):
        raise PlanError(f"a budget of {text} leaves {'everything' if limit > 0 else 'nothing'}", todo=_HOW)
    return Budget("macs" if kind == "macs" else "error", limit)


def choose(
    network: Network,
    recipe: Recipe,
    data: Data,
    *,
    budget: Budget | None = None,
    bake: bool = False,
    seed: int = 0,
    how: How | None = None,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> Chosen:
    """Measure what each site would lose, and choose what to swap; without a budget, what the recipe itself does.

    Raises:
        PlanError: the budget cannot be reached, or the recipe leaves nothing to choose.
        DataError: the network does not run on the images. FitError: its outputs cannot be compared.
    """
    given = fingerprint(network.model)
    found = bakeable(network.model) if bake else None
    model = shadow(network.model)
    if found is not None:
        bake_(model, found.paths)
    inputs = network.inputs or next(iter(data)).inputs.batched(2)
    with processes.agreeing():
        survey = sites.survey(Network(model, inputs))
        space = Space(recipe, survey, seed=seed)
        if not space.choices:
            reasons = list(dict.fromkeys(entry.skip for entry in space.plan([]).convs if entry.skip))
            what = "the recipe leaves no conv whose setting could be chosen"
            raise PlanError(": ".join([what, *reasons[:1]]), todo="Give a recipe for HetConv or OctaveConv.")
        whole = Operation("convert", "", "", space.plan(space.whole()).to_dict())
        reference = units.prepared(model, [whole], data)
    trials = Trials.of(space, survey, in_mode(reference, False), data, how or How(seed=seed), processes)
    key = states.identity_of(data.digest, network_hash(model), recipe.text, recipe.overrides, seed, how, inputs.record)
    search = _Search(space, trials, survey, _losses(key, trials, parts(progress, 0.05, 0.6)))
    way = _way(search, budget, parts(progress, 0.6, 1))
    plan = search.written(way, budget)
    plan = plan if found is None else with_baked(plan, found, given)
    return Chosen(plan, tuple(search.points()))


def _losses(key: str, trials: Trials, progress: Progress) -> list[list[float]]:
    """Measure, or take what was measured before: several budgets are asked for, one after the other."""
    if key not in _KNOWN:
        _KNOWN[key] = trials.losses(progress)
        for oldest in list(_KNOWN)[:-_MOST_KNOWN]:
            del _KNOWN[oldest]
    return _KNOWN[key]


def _way(search: _Search, budget: Budget | None, progress: Progress) -> Way:
    """Find the way that a budget leads to."""
    if budget is None:
        return search.way_of(search.space.whole())
    return search.within(budget.limit, progress) if budget.kind == "macs" else search.below(budget.limit, progress)


@dataclass
class _Search:
    """Ways through the choices of a network: counted, predicted, and measured where it matters."""

    space: Space
    trials: Trials
    survey: Survey
    alone: list[list[float]]  # errors
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    uniform: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        found = tuple(self.space.parts())
        losses = tuple((0.0, *(error**2 for error in errors)) for errors in self.alone)
        stay = [0] * len(losses)
        plan = self.space.plan(stay).gained.macs
        assert plan is not None
        assert self.survey.cost.macs is not None
        self.total = self.survey.cost.macs
        self.table = Table(losses, found, plan.after - Table(losses, found).cost(stay))
        self.ways = knapsack.ways(self.table)

    def way_of(self, levels: tuple[int, ...]) -> Way:
        return Way(self.table.cost(levels), self.table.loss(levels), levels)

    def within(self, share: float, progress: Progress) -> Way:
        """Find the way that is nearest to the original among those that cost no more."""
        limit = math.floor(share * self.total)
        first = self._fitting(self.ways, limit)
        if first is None:
            least = math.ceil(1000 * self._least() / self.total) / 1000
            raise PlanError(
                f"the budget macs={share:g} cannot be reached: macs={least:g} is the least with this recipe",
                todo="Ask for that or more, or give a recipe that claims more convs.",
            )
        tempered = Table(
            tuple(tuple(loss**0.75 for loss in losses) for losses in self.table.losses),
            self.table.parts,
            self.table.fixed,
        )
        uniform = sorted(self._uniform(limit), key=lambda way: way.loss)[:_UNIFORM]
        self.uniform |= {way.levels for way in uniform}
        candidates = [first, self._fitting(knapsack.ways(tempered), limit), *uniform]
        self._measure([way for way in candidates if way is not None], progress)
        corrected = self._fitting(knapsack.ways(self._corrected()), limit)
        self._measure([] if corrected is None else [corrected], progress)
        return self.way_of(min(self.measured, key=lambda levels: (self.measured[levels], self.table.cost(levels))))

    def below(self, error: float, progress: Progress) -> Way:
        """Find the cheapest way that was measured to be no further from the original."""
        aim, best = error, None
        for i in range(_ROUNDS):
            way = knapsack.below(self.ways, aim**2)
            if way is None or not any(way.levels) or way.levels in self.measured:
                break
            self._measure([way], parts(progress, i / _ROUNDS, (i + 1) / _ROUNDS))
            found = self.measured[way.levels]
            if found <= error and (best is None or way.cost < best.cost):
                best = way
            aim *= 0.95 * error / found if found else 2.0
        if best is None:
            smallest = min((loss for losses in self.alone for loss in losses), default=math.inf)
            raise PlanError(
                f"the budget error={error:g} cannot be kept: no setting that was measured loses so little",
                todo=f"Ask for more: the smallest loss of a single site is {smallest:.2g}.",
            )
        return best

    def _fitting(self, found: Sequence[Way], limit: int) -> Way | None:
        """Choose a way whose plan costs no more than the limit: a planner may do less than was counted."""
        asked = limit
        for _ in range(_TRIES):
            way = knapsack.within(found, asked)
            if way is None or not math.isfinite(way.loss):
                return None
            if (cost := self._cost(way.levels)) <= limit:
                return Way(cost, self.table.loss(way.levels), way.levels)
            asked = min(way.cost - 1, asked - (cost - limit))
        return None

    def _cost(self, levels: Sequence[int]) -> int:
        macs = self.space.plan(levels).gained.macs
        assert macs is not None
        return macs.after

    def _least(self) -> int:
        """The cost of the cheapest way that can be fitted."""
        return min(self._cost(way.levels) for way in self.ways if math.isfinite(way.loss))

    def _uniform(self, limit: int) -> Iterator[Way]:
        """Give, for each setting, the way that takes it for the choices that save most, until the limit is kept."""
        for words in dict.fromkeys(level.words for choice in self.space.choices for level in choice.levels):
            levels = [0] * len(self.space.choices)
            for i in sorted(range(len(levels)), key=lambda i: -self._saved(i, words)):
                levels[i] = _level(self.space.choices[i], words)
                way = self.way_of(tuple(levels))
                if way.cost <= limit and math.isfinite(way.loss) and self._cost(levels) <= limit:
                    yield way
                    break

    def _saved(self, i: int, words: str) -> int:
        return self._saves(i, _level(self.space.choices[i], words))

    def _saves(self, i: int, level: int) -> int:
        stay = [0] * len(self.space.choices)
        return self.table.cost(stay) - self.table.cost([*stay[:i], level, *stay[i + 1 :]])

    def _measure(self, found: Sequence[Way], progress: Progress) -> None:
        """Convert and fit, and note how far the outputs are from the original's."""
        for i, way in enumerate(found):
            if way.levels not in self.measured:
                step = parts(progress, i / len(found), (i + 1) / len(found))
                refit = self.trials.how.refit
                model = self.trials.fitted(self.space.plan(way.levels), refit=refit, progress=step)
                error = self.trials.error(model)
                self.measured[way.levels] = math.inf if error is None or math.isnan(error) else error

    def _corrected(self) -> Table:
        """Scale the losses of all levels by what the measured networks say of them.

        A choice's factor is the mean of measured over predicted loss of the networks in which it was swapped, beside
        that of all networks.
        """
        ratios = {levels: error**2 / (self.table.loss(levels) or 1.0) for levels, error in self.measured.items()}
        every = sum(ratios.values()) / len(ratios)
        factors = []
        for i in range(len(self.table.losses)):
            own = [ratio for levels, ratio in ratios.items() if levels[i]]
            factors.append((sum(own) / len(own) / every) ** 2 if own and every else 1.0)
        losses = tuple(
            tuple(loss * factor for loss in losses) for losses, factor in zip(self.table.losses, factors, strict=True)
        )
        return Table(losses, self.table.parts, self.table.fixed)

    def written(self, way: Way, budget: Budget | None) -> Plan:
        """Write the plan, with what each site would lose, and why others stay."""
        plan = self.space.plan(way.levels, with_weights=True)
        plan = foresee(with_permuted(plan, self.survey, None), self.survey)
        entries = {entry.path: entry for entry in plan.convs}
        for i, choice in enumerate(self.space.choices):
            told = {*tried_levels(len(choice.levels)), way.levels[i] - 1} - {-1}
            errors = {
                level.words: float(f"{error:.3g}")
                for k, (level, error) in enumerate(zip(choice.levels, self.alone[i], strict=True))
                if k in told and math.isfinite(error)
            }
            for path in choice.paths:
                update: dict[str, object] = {"loses": errors or None}
                if not way.levels[i] and entries[path].swap is None:
                    update["skip"] = self._why_not(i)
                entries[path] = entries[path].model_copy(update=update)
        measured = self.measured.get(way.levels)
        note = Budgeted(
            asked=None if budget is None else str(budget),
            predicted=float(f"{math.sqrt(way.loss):.4g}"),
            measured=None if measured is None else float(f"{measured:.4g}"),
            images=self.trials.fitted_to.images,
            held_back=self.trials.judged_on.images,
        )
        return plan.model_copy(update={"convs": tuple(entries.values()), "budget": note})

    def _why_not(self, i: int) -> str:
        """Say what a choice that stays would lose for what it would save."""
        worth = [
            (error**2 / saved, level.words, error, saved)
            for k, (level, error) in enumerate(zip(self.space.choices[i].levels, self.alone[i], strict=True), 1)
            if math.isfinite(error) and (saved := self._saves(i, k)) > 0
        ]
        if not worth:
            is_fitted = any(map(math.isfinite, self.alone[i]))
            return "it would save nothing" if is_fitted else "the images say too little about it to fit it"
        _, words, error, saved = min(worth)
        return (
            f"it would lose {error:.2g} of the outputs to save {saved / self.total:.1%} of the multiply-adds ({words})"
        )

    def _scale(self) -> float:
        """Say how measured errors compare with the sums over single sites.

        Most often they are smaller: sites make up for what was lost before them, and so do the layers behind.
        """
        pairs = [(error, math.sqrt(self.table.loss(levels))) for levels, error in self.measured.items()]
        return _mean([error / loss for error, loss in pairs if loss and 0 < error < math.inf])

    def points(self) -> Iterator[Point]:
        """Give all that is in the picture."""
        scale = self._scale()
        for way in knapsack.evenly([w for w in self.ways if math.isfinite(w.loss)], _POINTS, lambda way: way.cost):
            yield Point("predicted", way.cost / self.total, scale * math.sqrt(way.loss))
        for i, choice in enumerate(self.space.choices):
            for k, (level, error) in enumerate(zip(choice.levels, self.alone[i], strict=True), 1):
                if math.isfinite(error) and k - 1 in tried_levels(len(choice.levels)):
                    words = f"{', '.join(choice.paths)}, {level.words}"
                    yield Point("alone", 1 - self._saves(i, k) / self.total, error, words)
        best = min(self.measured, key=lambda levels: self.measured[levels], default=None)
        for levels, error in self.measured.items():
            kind: Literal["chosen", "uniform", "measured"] = "uniform" if levels in self.uniform else "measured"
            yield Point("chosen" if levels == best else kind, self._cost(levels) / self.total, error)


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean; 1 of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0


def _level(choice: Choice, words: str) -> int:
    return next((k for k, level in enumerate(choice.levels, 1) if level.words == words), 0)
