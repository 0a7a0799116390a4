"""Which channels become low: those that lose least, where the graph lets their order in the network be changed.

A feature map y of which channel c becomes low is left with up(pool(y_c)). What that loses

    by data     E[(y_c − up(pool(y_c)))²], times (γ/σ)² of the norm behind
    without     Σ (w_c − mean of its taps)², the part of a filter, with the norm behind in it, that sees no mean

is summed over all convs that write the channel. In each order of channels, those with the least sum go to the places
that are low in most convs; the others keep the order that they have among each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgeon.analysis.sites import Site, Survey
from surgeon.blocks import norms
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.channels.follow import Channels, Group, channels_of
from surgeon.conv import kernels, streams
from surgeon.conv.spec import ConvSpec
from surgeon.surgery.permute import NO_INPUT, OrderKept, Permuted
from surgeon.surgery.plan import Entry, Plan

_NO_NUMBERS = "its network holds no numbers that would say which channels lose least"
Scores = Mapping[str, Tensor]  # what each output channel of a conv loses, by the first name of the conv


def with_permuted(plan: Plan, survey: Survey, scores: Scores | None = None) -> Plan:
    """Add to a plan which channels change places, where its options say `low: least`, and why others do not.

    `scores` say what each output channel of a conv loses; without them the kernels do.
    """
    streamed = {entry.path: entry for entry in plan.swaps if isinstance(entry.block_options, TwoStreamOptions)}
    wanted = [entry for entry in streamed.values() if entry.block_options.low == "least"]  # type: ignore[attr-defined]
    if not wanted:
        return plan
    is_empty = any(survey.weights[entry.path].is_meta for entry in wanted)
    if is_empty or survey.inputs is None:
        why = _NO_NUMBERS if is_empty else NO_INPUT
        return plan.model_copy(update={"unpermuted": tuple(OrderKept(path=one.path, reason=why) for one in wanted)})
    choice = _Choice(survey, channels_of(survey.network))
    for entry in streamed.values():
        choice.count(entry)
    for site in survey.sites:
        choice.score(site, scores)
    kept = [OrderKept(path=one.path, reason=said) for one in wanted if (said := choice.obstacle(one)) is not None]
    return plan.model_copy(update={"permuted": choice.permuted(wanted), "unpermuted": tuple(kept)})


def lost_by_pooling(maps: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Give E[(y − up(pool(y)))²] for each channel of maps (n, c, h, w), times (γ/σ)² of the norm behind: (c,).

    >>> maps = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    >>> lost_by_pooling(maps)
    tensor([1., 0.], dtype=torch.float64)
    """
    maps = maps.double()
    lost = (maps - streams.up_to(streams.pool(maps), maps)).square().mean((0, 2, 3))
    if norm is None:
        return lost
    scale, _ = kernels.with_norm(torch.ones(len(lost), 1, 1, 1, dtype=lost.dtype, device=lost.device), None, norm)
    return lost * scale.flatten().double().square()


def chosen(score: Tensor, lowness: Tensor) -> list[int]:
    """Put the channels with the least scores to the places that are low most often: place i gets channel `chosen[i]`.

    >>> chosen(torch.tensor([5.0, 1.0, 7.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    [0, 2, 1, 3]
    """
    waiting = sorted(range(len(score)), key=lambda channel: (float(score[channel]), -channel))
    order = [0] * len(score)
    for level in sorted(set(lowness.tolist()), reverse=True):
        places = [place for place, found in enumerate(lowness.tolist()) if found == level]
        taken, waiting = sorted(waiting[: len(places)]), waiting[len(places) :]
        for place, channel in zip(places, taken, strict=True):
            order[place] = channel
    return order


class _Choice:
    """How often each place of every order is low, and what each channel loses."""

    def __init__(self, survey: Survey, channels: Channels) -> None:
        self.survey, self.channels = survey, channels
        self.lowness: dict[int, Tensor] = {}  # by the ids of groups, as below
        self.scores: dict[int, Tensor] = {}

    def count(self, entry: Entry) -> None:
        """Note which places are low before and behind a conv."""
        options, spec = entry.block_options, entry.spec
        assert isinstance(options, TwoStreamOptions)
        assert isinstance(spec, ConvSpec)
        low_in, low_out = options.ranges(spec)
        self._count(entry.path, 0, low_out, spec.c_out)
        if spec.groups == 1:
            self._count(entry.path, 1, low_in, spec.c_in)

    def _count(self, path: str, axis: int, low: streams.Ranges, channels: int) -> None:
        is_low = torch.zeros(channels)
        for limits in low:
            is_low[slice(*limits)] = 1
        for group, part in self._parts(path, axis, is_low):
            self.lowness[id(group)] = self.lowness.get(id(group), 0) + part / part.max().clamp(min=1)

    def score(self, site: Site, scores: Scores | None) -> None:
        """Add what the output channels of a conv lose."""
        if site.path not in self.survey.weights:
            return
        lost = _seen_by_taps(self.survey, site) if scores is None else scores.get(site.path)
        if lost is None:
            return
        for group, part in self._parts(site.path, 0, lost.double().cpu().nan_to_num(nan=torch.inf)):
            self.scores[id(group)] = self.scores.get(id(group), 0) + part

    def _parts(self, path: str, axis: int, numbers: Tensor) -> list[tuple[Group, Tensor]]:
        """Cut numbers for the channels on an axis of a kernel into those of each order."""
        found = self.channels.on(self.survey.weights[path], axis)
        return [
            (group, numbers[start : start + group.size * each].reshape(group.size, each).sum(1))
            for group, start, each in found
        ]

    def permuted(self, wanted: Sequence[Entry]) -> tuple[Permuted, ...]:
        """Give the permutations of all orders that one of the convs writes."""
        groups = {id(g): g for entry in wanted for g in self._written(entry) if not g.fixed and id(g) in self.scores}
        made = []
        for key, group in groups.items():
            order = chosen(self.scores[key], self.lowness[key])
            if order != list(range(group.size)):
                made.append(Permuted.of(group, order))
        return tuple(made)

    def _written(self, entry: Entry) -> list[Group]:
        return [group for group, _, _ in self.channels.on(self.survey.weights[entry.path], 0)]

    def obstacle(self, entry: Entry) -> str | None:
        """Say why the low output channels of a conv are the last ones after all; None if they could be chosen."""
        options, spec = entry.block_options, entry.spec
        assert isinstance(options, TwoStreamOptions)
        assert isinstance(spec, ConvSpec)
        if not options.ranges(spec)[1]:
            return None
        written = self._written(entry)
        if not written:
            return "its channels could not be followed through the network"
        partly = [group for group in written if len(set(self.lowness[id(group)].tolist())) > 1]
        if not partly:
            return "its channels keep their order in parts that are low or high as a whole"
        if all(group.fixed for group in partly):
            return partly[0].fixed
        return None


def _seen_by_taps(survey: Survey, site: Site) -> Tensor:
    """Give what the taps of each filter see beyond a mean, with the norm behind it."""
    weight = survey.weights[site.path].detach().double()
    if site.norm and norms.is_batch_norm(norm := survey.model.get_submodule(site.norm[0])):
        weight, _ = kernels.with_norm(weight, None, norms.core_of(norm))
    weight = weight.detach().double()
    return (weight - weight.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
