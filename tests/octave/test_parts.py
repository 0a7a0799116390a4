"""Slices, splits, enlarged maps and shapes between octave convs: the streams give what every conv alone would give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.surgery.plan import Plan

RECIPE = {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]}


class Between(nn.Module):
    """Two octave convs, a step, and two more."""

    def __init__(self, step: Callable[[Tensor], Tensor], channels: int = 16) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.step = nn.BatchNorm2d(16), step
        self.three, self.four = nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(self.step(self.norm(self.two(self.one(x))).relu())))


def swapped_halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([other, 2 * one], 1)


def three_parts(x: Tensor) -> Tensor:
    one, two, three = torch.split(x, [4, 8, 4], dim=1)
    return torch.cat([two + 1, one.relu(), three], 1)


def unequal_parts(x: Tensor) -> Tensor:
    parts = x.split(6, dim=-3)
    return torch.cat([parts[-1], parts[1]], 1)


def changed_in_place(x: Tensor) -> Tensor:
    one, _ = x.chunk(2, 1)
    one.mul_(2)
    return x


def a_changed_slice(x: Tensor) -> Tensor:
    part = x[:, 4:12]
    part.add_(1)
    return x


def a_changed_view(x: Tensor) -> Tensor:
    x.unflatten(1, (4, 4))[:, 0].unsqueeze(1).mul_(3)
    return x


def parts_as_they_are(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 1), 1)


def fine(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)[:, 4:12]


LOW = "takes low channels only"
WHOLE = "needs the whole map"
STEPS: dict[str, tuple[Callable[[Tensor], Tensor], int, str | None]] = {
    "halves": (swapped_halves, 16, LOW),
    "three parts": (three_parts, 16, LOW),
    "unequal parts": (unequal_parts, 10, LOW),
    "a slice of both": (lambda x: x[:, 4:12], 8, None),
    "slices from either end": (lambda x: torch.cat([x[:, :-3], x[:, 2:, :, :]], 1), 27, None),
    "high channels": (lambda x: x[:, :8], 8, None),
    "low channels": (lambda x: x[:, 8:, ...], 8, LOW),
    "low channels at full resolution": (lambda x: F.max_pool2d(x, 3, 1, 1)[:, 8:], 8, None),
    "a slice at full resolution": (fine, 8, None),
    "twice as large": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), 16, None),
    "larger by two factors": (nn.Upsample(scale_factor=(3, 2)), 16, None),
    "larger at full resolution": (lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2), 16, None),
    "scaled by its width": (lambda x: x / x.size(-1), 16, None),
    "parts of which one is changed": (changed_in_place, 16, WHOLE),
    "a slice that is changed": (a_changed_slice, 16, WHOLE),
    "parts that nobody takes one by one": (parts_as_they_are, 16, WHOLE),
    "a view of a slice that is changed": (a_changed_view, 16, WHOLE),
}


def converted(net: nn.Module, size: tuple[int, int]) -> tuple[Plan, nn.Module, nn.Module]:
    """A plan, the network converted by it, and the same with every conv splitting and joining."""
    plan = surgeon.plan(net, RECIPE, (1, 16, *size))
    keep = [
        one.model_copy(update={"options": one.options | {"seams": "keep"}}) if one.swap else one for one in plan.convs
    ]
    return plan, surgeon.convert(net, plan), surgeon.convert(net, plan.model_copy(update={"convs": tuple(keep)}))


@pytest.mark.parametrize("size", [(32, 32), (31, 29)])
@pytest.mark.parametrize("what", STEPS)
def test_streams_go_through_it_exactly_or_are_joined_for_it(what: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    step, channels, seam = STEPS[what]
    net = Between(step, channels).double().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.3, 3)
    plan, streams, alone = converted(net, size)
    reasons = [one.reason for one in plan.seams if one.reason != "it reads a plain map"]
    assert [reason.endswith(seam) for reason in reasons] == [True] if seam else not plan.seams
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(streams(x), alone(x)) <= 1e-14
        assert relative(streams(x), net(x)) > 1e-3


def test_only_a_map_of_which_both_are_taken_is_read_as_two_streams() -> None:
    reads = {}
    for what in ("a slice of both", "high channels", "slices from either end", "twice as large"):
        plan, *_ = converted(Between(*STEPS[what][:2]), (32, 32))
        options = {entry.path: entry.options for entry in plan.convs}["three"]
        reads[what] = (options["alpha_in"], options.get("low_in"))
    assert reads["a slice of both"] == (0.5, None)
    assert reads["high channels"][0] == 0
    assert reads["twice as large"] == (0.5, None)
    assert [tuple(one) for one in reads["slices from either end"][1]] == [(8, 13), (19, 27)]


class PooledShortcut(nn.Module):
    """A pooling brings both streams to one resolution, and a sum with two streams makes them two again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.second, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.second(self.block(x) + F.max_pool2d(x, 2, ceil_mode=True)))


@pytest.mark.parametrize("size", [(32, 32), (31, 29)])
def test_a_pooled_shortcut_is_low_passed_where_it_is_added(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = PooledShortcut().double().eval()
    plan, streams, alone = converted(net, size)
    assert not plan.seams
    assert len(plan.low_passed) == 1
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(streams(x), alone(x)) <= 1e-14


class Grouped(nn.Module):
    """A block as RegNets have them: 12 of 24 low channels would cut one of the three groups of 8."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(16, channels, 1), nn.Conv2d(16, channels, 1)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 8)
        self.last = nn.Conv2d(channels, channels, 1)
        self.again = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.last(self.grouped(self.first(x))) + self.shortcut(x))


@pytest.mark.parametrize(("channels", "low"), [(24, 8), (16, 8), (104, 48), (8, None)])
def test_low_channels_leave_groups_whole(channels: int, low: int | None) -> None:
    plan = surgeon.plan(Grouped(channels), RECIPE, (1, 16, 32, 32))
    entries = {entry.path: entry for entry in plan.convs}
    assert not plan.seams
    if low is None:  # one group: that conv stays
        assert entries["grouped"].swap == "octave"
        return
    assert all(entry.swap for entry in entries.values())
    shares = {entries[path].options["alpha_out"] for path in ("first", "shortcut", "grouped", "last")}
    assert shares == {low / channels}
    assert entries["grouped"].options["alpha_in"] == low / channels
    x = torch.randn(2, 16, 32, 32)
    assert surgeon.convert(Grouped(channels), plan)(x).shape == (2, channels, 32, 32)
