"""How two streams go through a network: read from its graph, and drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon
from surgeon.page.flow import Flow, flows_in
from surgeon.page.gather import gather
from surgeon.page.lanes import drawing
from surgeon.surgery.look import network_for

SHAPE = (1, 3, 32, 32)


class Shortcut(nn.Module):
    """Two convs with a shortcut around the second, and a step at the end that needs the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.second(x)
        return self.mix(self.third(x))


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return surgeon.convert(Shortcut(), "octave", SHAPE)


@pytest.fixture(scope="module")
def flow(converted: nn.Module) -> Flow:
    (found,) = flows_in(converted)
    return found


def names(flow: Flow) -> list[str]:
    return [step.name for step in flow.steps]


def test_the_steps_on_both_streams_are_one_and_norms_belong_to_their_conv(flow: Flow) -> None:
    assert names(flow) == ["x", "first", "second", "split", "sum", "third", "output"]
    first, second, split, total = flow.steps[1:5]
    assert (first.kind, first.high, first.low, first.then) == ("conv", 8, 0, ("BatchNorm2d", "relu"))
    assert (second.kind, second.reads, second.high, second.low) == ("octave", (1,), 4, 4)
    assert (split.reads, total.reads, total.high, total.low) == ((1,), (3, 2), 4, 4)


def test_where_streams_end_the_channels_are_whole_again(flow: Flow) -> None:
    third = flow.steps[5]
    assert (third.high, third.low) == (8, 0)  # the conv in front of what needs the whole map writes one stream


def test_a_fused_network_has_the_same_streams(converted: nn.Module, flow: Flow) -> None:
    (fused,) = flows_in(surgeon.fuse(converted, SHAPE))
    convs = [(step.name, step.high, step.low) for step in fused.steps if step.kind == "octave"]
    assert convs == [(step.name, step.high, step.low) for step in flow.steps if step.kind == "octave"]


def test_a_plan_is_drawn_as_the_network_would_be(converted: nn.Module, flow: Flow) -> None:
    torch.manual_seed(0)
    model = Shortcut()
    keys = list(model.state_dict())
    plan = surgeon.plan(model, "octave", SHAPE)
    made = gather([("net", network_for(model, SHAPE))], plan=plan)
    assert made.flows == (flow,)
    assert list(model.state_dict()) == keys  # and nothing was done to it


class Dense(nn.Module):
    """A conv beside what it reads, as in a DenseNet: of the map behind it, only the new channels have low ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 3, padding=1)
        self.fourth = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = torch.cat([x, self.second(x).relu()], 1)
        return self.fourth(self.third(x))


def test_maps_side_by_side_are_one_step_although_a_plain_one_is_in_the_high_stream_alone() -> None:
    (found,) = flows_in(surgeon.convert(Dense(), "octave", SHAPE))
    (cat,) = [step for step in found.steps if step.kind == "cat"]
    assert [found.steps[one].name for one in cat.reads] == ["first", "second"]
    assert (cat.high, cat.low) == (12, 4)
    assert names(found) == ["x", "first", "second", "cat", "third", "fourth", "output"]


def test_a_network_without_octaves_has_no_flow() -> None:
    assert flows_in(Shortcut()) == ()
    assert flows_in(surgeon.convert(Shortcut(), "acnet", SHAPE)) == ()


def test_steps_of_one_stream_are_put_together_where_they_are_many() -> None:
    tail = [nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(Shortcut(), *tail, nn.AdaptiveAvgPool2d(1))
    recipe = {"surgeon": 1, "rules": [{"swap": "octave", "match": {"name": "0.*"}, "with": {"alpha": 0.5}}]}
    (found,) = flows_in(surgeon.convert(model, recipe, SHAPE))
    last = found.steps[-2]
    assert last.kind == "more"
    assert last.paths == ("1", "3", "5")
    assert last.name == "4 steps in one stream"


def test_the_drawing_has_a_row_for_every_step_and_says_why_there_is_a_seam(flow: Flow) -> None:
    drawn = drawing(flow, {3: "a reason <b>"})
    assert all(f">{name}</text>" in drawn for name in names(flow))
    assert "seam: a reason &lt;b&gt;" in drawn
    assert drawn.count("<g>") == len(flow.steps)
    assert "arc" in drawn  # the shortcut leads past the second conv
