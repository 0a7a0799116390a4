"""What each setting of each choice would lose: the network with it alone converted and fitted, beside the original.

Where a choice is one conv that is planned alone, its input is the original's whatever the setting, so one pass over the
images serves all settings of all such convs; only the solution and one run of the network differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis.sites import Survey
from surgeon.blocks import contract
from surgeon.blocks.fittable import Fittable
from surgeon.blocks.norms import core_of
from surgeon.blocks.two_streams import TwoStreams
from surgeon.errors import DataError, FitError
from surgeon.fitting import fit, importance
from surgeon.fitting.data import Data
from surgeon.fitting.fit import How
from surgeon.fitting.passes import Pass, Seen
from surgeon.fitting.processes import Processes
from surgeon.fitting.settle import settle_
from surgeon.fitting.space import Choice, Level, Space
from surgeon.fitting.units import Unit, unit_of, units
from surgeon.models.copies import duplicate, in_mode
from surgeon.models.progress import Progress
from surgeon.surgery.operate import place_, prepare, stream_
from surgeon.surgery.plan import Plan

_LEAST = 256  # images that a trial is fitted to, if there are so many
_JUDGED = 128  # images that are held back, and on which it is judged
_FEW = 4  # levels of a choice that are all tried
_MEMORY = 2**30  # bytes of sums that are collected in one pass


@dataclass(frozen=True, slots=True)
class Trials:
    """Networks that are converted and fitted to be measured, and thrown away.

    `reference` is the original in eval mode, as modules that can be swapped; `fitted_to` and `judged_on` are different
    images.
    """

    space: Space
    survey: Survey  # of the reference
    reference: nn.Module
    fitted_to: Data
    judged_on: Data
    metrics: Mapping[str, Tensor]
    how: How
    processes: Processes

    @classmethod
    def of(
        cls, space: Space, survey: Survey, reference: nn.Module, data: Data, how: How, processes: Processes
    ) -> Trials:
        """Hold images back, and find what errors of each conv cost at the outputs.

        Raises:
            FitError: the outputs cannot be compared.
        """
        rest, judged = data.held_back(min(_JUDGED, max(1, data.images // 4)), how.seed)
        made = cls(space, survey, reference, rest, judged, {}, how, processes)
        if made.error(reference) is None:
            raise FitError(
                "the outputs of the network cannot be compared number by number",
                todo="Choose the convs with a recipe instead of a budget.",
            )
        convs = {path: reference.get_submodule(path) for choice in space.choices for path in choice.paths}
        if how.metric:
            pairs = [Unit(path, conv, conv) for path, conv in convs.items()]
            metrics = importance.metrics(reference, pairs, rest.first(_LEAST), how.seed, processes)
            made = cls(space, survey, reference, rest, judged, metrics, how, processes)
        return made

    def error(self, model: nn.Module) -> float | None:
        """The relative L2 of the outputs on the images that are held back."""
        return fit.worth(model, self.reference, self.judged_on, self.processes).relative_l2

    def fitted(self, plan: Plan, *, refit: bool, progress: Progress | None = None) -> nn.Module:
        """Carry a plan out on a copy and fit that; each conv splits and joins by itself, which computes the same."""
        model = duplicate(self.survey.model)
        place_(model, prepare(model, plan), self.survey.network)
        stream_(model, plan, self.survey.network, only_low_pass=True)
        in_mode(model, False)
        inputs = next(iter(self.fitted_to)).inputs.batched(2)
        found = units(model, self.reference, inputs, refit=refit, survey=self.survey)
        data = self.fitted_to.first(max(_LEAST, *(self._images_for(unit) for unit in found)))
        for i, unit in enumerate(found):
            if progress is not None:
                progress(f"fitting {unit.path}", i / len(found))
            sums = self._collected([unit], model, data)[unit]
            if unit.is_block or not any(one.is_thin for one in sums.values()):
                settle_(unit, sums, self.metrics.get(unit.path))
        return model

    def losses(self, progress: Progress) -> list[list[float]]:
        """For each choice, the error that each of its levels causes alone; infinite where it cannot be fitted."""
        choices = self.space.choices
        found: dict[Choice, list[float]] = {}
        alone = [choice for choice in choices if not choice.has_streams]
        for group in self._groups(alone):
            progress(f"looking at what {group[0].paths[0]} sees", len(found) / len(choices))
            found |= dict(self._alone(group))
        for choice in choices:
            if choice.has_streams:
                progress(f"trying {choice.paths[0]}", len(found) / len(choices))
                tried = {level: self._with_streams(choice, level) for level in tried_levels(len(choice.levels))}
                found[choice] = _filled(tried, len(choice.levels))
        return [found[choice] for choice in choices]

    def _with_streams(self, choice: Choice, level: int) -> float:
        levels = [level + 1 if one is choice else 0 for one in self.space.choices]
        plan = self.space.plan(levels)
        if not plan.swaps:
            return 0.0
        try:
            return _known(self.error(self.fitted(plan, refit=False)))
        except DataError:
            return math.inf

    def _alone(self, group: Sequence[Choice]) -> Iterator[tuple[Choice, list[float]]]:
        """Fit convs one by one to what they see in the original."""
        model = in_mode(duplicate(self.reference), False)
        pairs = {choice: self._unit(choice, choice.levels[0], model) for choice in group}
        most = max(self._images_for(unit) for unit in pairs.values())
        data = self.fitted_to.first(max(_LEAST, most))
        sums = self._collected(list(pairs.values()), self.reference, data)
        for choice, first in pairs.items():
            yield (
                choice,
                [self._error_with(self._unit(choice, one, model), sums[first], model) for one in choice.levels],
            )

    def _error_with(self, unit: Unit, sums: Mapping[str, Seen], model: nn.Module) -> float:
        """The error that one fitted block causes in an otherwise unchanged copy."""
        norm: Any = None if unit.norm is None else core_of(unit.norm)
        mean = None if norm is None else norm.running_mean.clone()
        before = model.get_submodule(unit.path)
        try:
            settle_(unit, sums, None, is_quick=True)
            model.set_submodule(unit.path, unit.made)
            return _known(self.error(model))
        except DataError:
            return math.inf
        finally:
            model.set_submodule(unit.path, before)
            if norm is not None:
                norm.running_mean.copy_(mean)

    def _unit(self, choice: Choice, level: Level, model: nn.Module) -> Unit:
        """Build the block of one level."""
        path, options = choice.paths[0], level.options[choice.paths[0]]
        conv: Any = self.reference.get_submodule(path)
        generator = torch.Generator().manual_seed(self.how.seed)
        block = in_mode(contract.from_conv(choice.block, conv, options, norm=None, generator=generator), False)
        return unit_of(path, block, model, self.reference, self.survey)

    def _collected(self, found: Sequence[Unit], model: nn.Module, data: Data) -> Mapping[Unit, Mapping[str, Seen]]:
        """Run the images once through both networks, which may be the same."""
        collected = Pass(found)
        collected.run(model, self.reference, data, processes=self.processes)
        return collected.sums

    def _groups(self, choices: Sequence[Choice]) -> Iterator[list[Choice]]:
        """Cut choices into groups whose sums fit into memory together."""
        group: list[Choice] = []
        held = 0
        for choice in choices:
            size = 2 * 8 * self._features(choice.paths[0]) ** 2
            if group and held + size > _MEMORY:
                yield group
                group, held = [], 0
            group.append(choice)
            held += size
        if group:
            yield group

    def _features(self, path: str) -> int:
        spec = next(site.spec for site in self.survey.sites if path in site.paths)
        return 1 if spec is None else spec.c_in // spec.groups * spec.kernel[0] * spec.kernel[1]

    def _images_for(self, unit: Unit) -> int:
        """How many images have twice as many pixels as a filter has taps, in a low map if there is one."""
        site = next((site for site in self.survey.sites if unit.path in site.paths), None)
        if site is None or not site.runs or not unit.is_block:
            return 1
        h, w = site.runs[0].shape_out[-2:]
        pixels = max(1, h * w // (1 if _is_plain(unit.made) else 4))
        return math.ceil(2 * self._features(unit.path) / pixels)


def tried_levels(count: int) -> range:
    """The levels that are tried: of many only three or four, the last one among them."""
    step = 1 if count <= _FEW else math.ceil(count / 3)
    return range((count - 1) % step, count, step)


def _filled(tried: Mapping[int, float], count: int) -> list[float]:
    """Put between the errors that were found what lies on the way, as of numbers that grow by factors.

    Below the first one, errors grow evenly from none.

    >>> [round(error, 3) for error in _filled({1: 0.2, 3: 0.8}, 4)]
    [0.1, 0.2, 0.4, 0.8]
    """
    known = sorted(tried)
    found = [tried[known[0]] * (level + 1) / (known[0] + 1) for level in range(known[0])]
    for low, high in pairwise(known):
        ratio = tried[high] / tried[low] if tried[low] and math.isfinite(tried[high]) else 1.0
        found += [tried[low] * ratio ** ((level - low) / (high - low)) for level in range(low, high)]
    return [*found, tried[known[-1]]]


def _is_plain(block: nn.Module) -> bool:
    return isinstance(block, Fittable) and not isinstance(block, TwoStreams)


def _known(error: float | None) -> float:
    return math.inf if error is None or math.isnan(error) else error
