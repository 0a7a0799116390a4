"""What a budget can choose among: for each conv that a recipe swaps, or for convs that go together, several settings.

A conv that is planned alone is a choice by itself. Convs of two streams whose outputs are added share one: their maps
have the same low channels. Level 0 of every choice leaves its convs as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from surgeon.analysis.sites import Site, Survey, measure_calls
from surgeon.blocks import Block, BlockOptions, Wanted, contract
from surgeon.blocks.fittable import Fittable
from surgeon.blocks.two_streams import TwoStreamBlock, TwoStreamOptions
from surgeon.fitting.knapsack import Part
from surgeon.octave.maps import Maps, maps_of
from surgeon.recipes.recipe import Recipe
from surgeon.surgery import deployed
from surgeon.surgery.make import make
from surgeon.surgery.plan import Entry, Plan

_STAYS = "the budget leaves it as it is"


@dataclass(frozen=True, slots=True)
class Level:
    """A setting of a choice: in words, and the options of each of its convs."""

    words: str
    options: Mapping[str, BlockOptions]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Convs that are decided together. `levels` are those beyond the first one, which leaves them as they are."""

    block: type[Block]
    paths: tuple[str, ...]
    levels: tuple[Level, ...]

    @property
    def has_streams(self) -> bool:
        return issubclass(self.block, TwoStreamBlock)


class Space:
    """All choices that a recipe leaves open in a network, and what their combinations cost."""

    def __init__(self, recipe: Recipe, survey: Survey, *, seed: int) -> None:
        self.recipe, self.survey, self.seed = recipe, survey, seed
        self._bare = replace(survey, weights={})  # counting what kernels keep would take long, and is not asked here
        self._sites = {site.path: site for site in survey.sites}
        self._costs: dict[object, int] = {}
        whole = make(recipe, self._bare, seed=seed)
        swaps = [one for one in whole.swaps if issubclass(one.block, Fittable) and one.block.is_cheaper]
        self._wanted = {one.path: _wanted(one, recipe) for one in swaps if _is_open(one, recipe)}
        self._streams = {path: one for path, one in self._wanted.items() if issubclass(one.block, TwoStreamBlock)}
        self._maps = maps_of(self._bare, self._streams) if self._streams else Maps((), {})
        self.choices = [*self._alone(), *self._together()]

    def plan(self, levels: Sequence[int], *, with_weights: bool = False) -> Plan:
        """Plan with a level for each choice; `with_weights`, also count what kernels keep."""
        chosen: dict[str, BlockOptions | str] = dict.fromkeys(self._wanted, _STAYS)
        for path, one in self._streams.items():
            chosen[path] = one.options.model_copy(update={"alpha": 0.0, "alpha_out": 0.0})
        for choice, level in zip(self.choices, levels, strict=True):
            chosen |= choice.levels[level - 1].options if level else {}
        return make(self.recipe, self.survey if with_weights else self._bare, seed=self.seed, chosen=chosen)

    def whole(self) -> tuple[int, ...]:
        """The levels that are nearest to what the recipe itself does: for all choices the one that it names, if any."""
        found = []
        for choice in self.choices:
            own = [self._wanted[path].options for path in choice.paths]
            same = [i for i, level in enumerate(choice.levels, 1) if list(level.options.values()) == own]
            found.append(same[0] if same else 1)
        return tuple(found)

    def parts(self) -> list[Part]:
        """Say what each conv costs with every combination of the levels that it depends on, as it is deployed."""
        numbers = {path: i for i, choice in enumerate(self.choices) for path in choice.paths}
        found = []
        for path, one in self._wanted.items():
            kinds = [self._maps.writers[kind][0] for kind in self._maps.reads.get(path, ())]
            reads = tuple(numbers[first] for first in kinds if first in numbers)
            choices = tuple(sorted({*reads, *([numbers[path]] if path in numbers else [])}))
            if not choices:
                continue
            keys = product(*(range(len(self.choices[i].levels) + 1) for i in choices))
            macs = {key: self._macs(path, one, dict(zip(choices, key, strict=True)), reads, numbers) for key in keys}
            found.append(Part(choices, macs))
        return found

    def _alone(self) -> Iterator[Choice]:
        """Give the convs that are planned one by one."""
        for path, one in self._wanted.items():
            if path not in self._streams:
                levels = tuple(self._levels((path,), one))
                if levels:
                    yield Choice(one.block, (path,), levels)

    def _together(self) -> Iterator[Choice]:
        """Give the convs that write the same kind of map."""
        for paths in self._maps.writers:
            first = self._wanted[paths[0]]
            if levels := tuple(self._levels(paths, first)):
                yield Choice(first.block, paths, levels)

    def _levels(self, paths: Sequence[str], first: Wanted) -> Iterator[Level]:
        """List the settings that no conv refuses."""
        for setting in first.block.settings(first.options):
            changed = _changed(setting, first)
            options = {path: self._wanted[path].options.model_copy(update=changed) for path in paths}
            if not any(self._refuses(path, one) for path, one in options.items()):
                words = ", ".join(f"{name}: {value:g}" for name, value in changed.items())
                yield Level(words or first.block.name, options)

    def _refuses(self, path: str, options: BlockOptions) -> bool:
        site, block = self._sites[path], self._wanted[path].block
        if site.spec is None:
            return True
        if isinstance(options, TwoStreamOptions):  # its role is planned; here it is asked about its output only
            options = options.model_copy(update={"alpha_in": 0.0, "alpha_out": options.alpha})
        return contract.refusal(block, site.spec, site.size, options) is not None

    def _macs(
        self, path: str, one: Wanted, levels: Mapping[int, int], reads: Sequence[int], numbers: Mapping[str, int]
    ) -> int:
        """Count the multiply-adds of a conv."""
        own = self._options_at(numbers.get(path), levels, path)
        if not isinstance(one.options, TwoStreamOptions):
            return self._cost(path, one.block, own)
        before = self._share_read(path, levels, reads) if reads else 0.0
        behind = own.alpha if isinstance(own, TwoStreamOptions) else 0.0
        if one.options.seams == "keep" or (not reads and not self._is_read(path)):
            before = behind
        if not before and not behind:
            return self._cost(path, one.block, None)
        return self._cost(path, one.block, one.options.model_copy(update={"alpha_in": before, "alpha_out": behind}))

    def _is_read(self, path: str) -> bool:
        """Whether another conv reads the two streams that this one writes."""
        kinds = {i for i, paths in enumerate(self._maps.writers) if path in paths}
        return any(kinds & set(read) for read in self._maps.reads.values())

    def _options_at(self, choice: int | None, levels: Mapping[int, int], path: str) -> BlockOptions | None:
        if choice is None or not (level := levels[choice]):
            return None
        return self.choices[choice].levels[level - 1].options[path]

    def _share_read(self, path: str, levels: Mapping[int, int], reads: Sequence[int]) -> float:
        """The share of low channels in what a conv reads; of several kinds of maps, by their channels."""
        low = whole = 0.0
        for choice in reads:
            first = self.choices[choice].paths[0]
            options, spec = self._options_at(choice, levels, first), self._sites[first].spec
            count = 1 if spec is None else spec.c_out
            whole += count
            low += count * options.alpha if isinstance(options, TwoStreamOptions) else 0.0
        return low / whole

    def _cost(self, path: str, block: type[Block], options: BlockOptions | None) -> int:
        """The multiply-adds of a conv with these options as it is deployed; equal convs are measured once."""
        site = self._sites[path]
        before = site.cost.macs or 0
        if options is None or site.spec is None or contract.refusal(block, site.spec, site.size, options):
            return before
        key = (block, site.spec, options, site.runs)
        if key not in self._costs:
            self._costs[key] = _deployed(site, block, options)
        return self._costs[key]


def _deployed(site: Site, block: type[Block], options: BlockOptions) -> int:
    assert site.spec is not None
    if folded := deployed.folded(block, site.spec, options, with_norm=False):
        return round(folded.share * (site.cost.macs or 0))
    with torch.device("meta"):
        conv = site.spec.build(like=torch.empty(0, dtype=site.dtype))
    made = contract.from_conv(block, conv, options, norm=None, generator=torch.Generator())
    return measure_calls(made, site.runs).macs or 0


def _wanted(entry: Entry, recipe: Recipe) -> Wanted:
    rule = next(rule for rule in recipe.rules if str(rule) == entry.rule)
    assert rule.options is not None
    return Wanted(entry.block, rule.options)


def _is_open(entry: Entry, recipe: Recipe) -> bool:
    """Whether the recipe leaves something to choose: not where it says itself which channels are low."""
    options = _wanted(entry, recipe).options
    return not isinstance(options, TwoStreamOptions) or (options.alpha_in, options.alpha_out) == (None, None)


def _changed(setting: BlockOptions, first: Wanted) -> dict[str, float]:
    """What tells a setting from the others of its block."""
    every = [one.model_dump() for one in first.block.settings(first.options)]
    return {name: value for name, value in setting.model_dump().items() if len({str(one[name]) for one in every}) > 1}
