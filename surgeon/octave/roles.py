"""The roles of octave convs: where two streams begin, how far they go, and where they end.

A region is a set of convs joined by steps that two streams can go through. Of the convs that a recipe gives to blocks
of two streams,

- a conv writes high channels only (alpha_out = 0) if its low map would be smaller than `min_size`, or if no
  wanted conv with a large enough low map reads its output; unless that output is added to low channels;
- a conv reads low channels (alpha_in = alpha) exactly if its input has some; behind a concatenation they are in several
  ranges;
- a conv with groups writes low channels only if it reads some;
- a conv that neither reads nor writes low channels stays as it is, and so does one whose swap would save nothing.

For Oct-ResNet and Oct-MobileNet these are the published roles. A plain map that is added to an octave map,
for example by the shortcut that leads into a region, is low-passed there. A conv that is called twice, or that no graph
shows, splits and joins for itself.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgeon.analysis.sites import Survey, measure_calls
from surgeon.blocks import Wanted, contract
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.octave.region import NO_LOW, Region, Roles, fixed_role


def assign(survey: Survey, wanted: Mapping[str, Wanted[TwoStreamOptions]]) -> Roles:
    """Give every wanted conv its role; a conv whose role is refused is left out, and the others are planned anew.

    A swap is left out, too, if without it the plan would cost no more. This is the planner of all two-stream blocks.
    """
    planner = _Planner(survey, wanted)
    made = planner.plan({})
    while (without := planner.without_an_idle_swap(made)) is not None:
        made = without
    return made.roles


def regions(survey: Survey, wanted: Mapping[str, Wanted[TwoStreamOptions]]) -> list[Region]:
    """Give the regions of a network, with the layouts of all that is in them."""
    return _Planner(survey, wanted).plan({}).regions


@dataclass(slots=True)
class _Planned:
    """The roles with some convs left out, and what was seen of the islands."""

    roles: Roles
    regions: list[Region]
    left_out: dict[str, str]


class _Planner:
    """Plans all convs of a network together, again and again, until no role is refused and none is idle."""

    def __init__(self, survey: Survey, wanted: Mapping[str, Wanted[TwoStreamOptions]]) -> None:
        self.survey, self.wanted = survey, wanted
        self.sites = {site.path: site for site in survey.sites}
        self._costs: dict[object, int | None] = {}

    def plan(self, left_out: Mapping[str, str]) -> _Planned:
        """Plan without some convs, each of which has a reason; the roles that are refused are left out as well."""
        refused, open_ended = dict(left_out), set[str]()
        while True:
            roles = Roles(skips=dict(refused))
            left = {path: one.options for path, one in self.wanted.items() if path not in refused}
            islands = self.survey.network.islands
            regions = [Region(self.survey, one, self.sites, left, roles, open_ended) for one in islands]
            for region in regions:
                region.assign()
            if added := {path for region in regions for path in region.added_to_streams()} - open_ended:
                open_ended |= added
                continue
            for path, options in left.items():  # convs that no graph shows
                if path not in roles.options and path not in roles.skips:
                    fixed = fixed_role(options)
                    roles.options |= {path: fixed} if any(fixed.alphas) else {}
                    roles.skips |= {} if any(fixed.alphas) else {path: NO_LOW}
            found = {path: why for path in roles.options if (why := self._refusal(path, roles))}
            if not found:
                return _Planned(roles, regions, refused)
            refused |= found

    def without_an_idle_swap(self, made: _Planned) -> _Planned | None:
        """Plan without a swap that saves nothing, if there is one without which the others cost no more."""
        flat = [path for path, options in made.roles.options.items() if self._saves_nothing(path, options)]
        needed = {path for region in made.regions for path in region.needed(flat)} if flat else set()
        for path in flat:
            if path not in needed:
                less = self.plan(made.left_out | {path: "swapping it would save nothing"})
                if self._macs(less.roles) <= self._macs(made.roles):
                    return less
        return None

    def _refusal(self, path: str, roles: Roles) -> str | None:
        site = self.sites[path]
        assert site.spec is not None
        return contract.refusal(self.wanted[path].block, site.spec, site.size, roles.options[path])

    def _saves_nothing(self, path: str, options: TwoStreamOptions) -> bool:
        before = self.sites[path].cost.macs
        return before is not None and self._cost(path, options) >= before

    def _macs(self, roles: Roles) -> int:
        """The multiply-adds of all wanted convs."""
        made = (self._cost(path, options) for path, options in roles.options.items())
        return sum(made) + sum(self.sites[path].cost.macs or 0 for path in self.wanted if path not in roles.options)

    def _cost(self, path: str, options: TwoStreamOptions) -> int:
        """The multiply-adds of a conv once it is swapped; equal convs are measured once."""
        site, block = self.sites[path], self.wanted[path].block
        assert site.spec is not None
        key = (block, site.spec, options, site.runs)
        if key not in self._costs:
            with torch.device("meta"):
                conv = site.spec.build(like=torch.empty(0, dtype=site.dtype))
            swapped = contract.from_conv(block, conv, options, norm=None, generator=torch.Generator())
            self._costs[key] = measure_calls(swapped, site.runs).macs
        return self._costs[key] or 0
