"""What was gained: counted for the network as it is deployed, and timed on a clock that the tests turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.errors import CaptureError, RecipeError
from surgeon.models.cost import measure
from surgeon.surgery import bench, clocks
from surgeon.surgery import plan as plans

SHAPE = (2, 3, 16, 16)


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in in (3, 16, 16):
        layers += [nn.Conv2d(c_in, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("recipe", ["acnet", "hetconv-p4", "octave"])
def test_what_is_gained_is_what_the_fused_network_costs(recipe: str) -> None:
    net = _net()
    plan = surgeon.plan(net, recipe, SHAPE)
    fused = surgeon.fuse(surgeon.convert(net, plan))
    costs = measure(fused, surgeon.Inputs((torch.zeros(SHAPE),)))
    assert plan.swaps
    assert plan.gained.macs is not None
    assert plan.gained.macs.after == costs.macs
    norms = sum(p.numel() for m in fused.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    if recipe == "acnet":
        assert (costs.params, norms) == (plan.gained.params.after, 0)
        assert plan.total.params.after > plan.gained.params.after


def test_the_last_line_says_what_is_gained() -> None:
    def line(recipe: str) -> str:
        (said,) = [one for one in str(surgeon.plan(_net(), recipe, SHAPE)).splitlines() if one.startswith("gained")]
        return said

    assert line("acnet").startswith("gained, once it is fused: parameters ×0.99 (5.14 k → 5.09 k), multiply-adds ×1.00")
    assert line("acnet").endswith("the blocks add nothing to what is deployed")
    assert line("hetconv-p4").startswith("gained: parameters ×0.40")
    assert "deployed" not in line("hetconv-p4")


def test_a_block_whose_norm_stays_folds_to_a_conv_with_a_bias() -> None:
    plan = surgeon.plan(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), "acnet", SHAPE)
    assert (plan.gained.params.before, plan.gained.params.after) == (216, 224)


@pytest.fixture
def slow_before(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every run of the network as it is take four times as long as one of the converted network."""
    turns = [0]
    first: list[object] = []

    def took(clock: object, call: object, repeats: int) -> float:
        turns[0] += 1
        return 4e-3 if first and call is first[0] else 1e-3

    prepare = bench._prepare

    def prepared(*arguments: object) -> object:
        made = prepare(*arguments)  # type: ignore[arg-type]
        first.append(made.runner.call)
        return made

    monkeypatch.setattr(bench, "_prepare", prepared)
    monkeypatch.setattr(clocks.HostClock, "seconds", took)
    return turns


def test_a_plan_can_be_timed_and_says_so(slow_before: list[int]) -> None:
    plan = surgeon.plan(_net(), "hetconv-p4", SHAPE, time=True)
    assert plan.time is not None
    assert (plan.time.before, plan.time.after, plan.time.ratio) == (4e-3, 1e-3, 0.25)
    assert plan.time.quartiles == (0.25, 0.25)
    assert plan.time.is_reliable
    assert slow_before[0] >= 30  # 15 rounds of both
    (said,) = [one for one in str(plan).splitlines() if one.startswith("time")]
    assert said.startswith("time ×0.25 (4 → 1 ms; quartiles 0.25 … 0.25; both fused, norms too; cpu, ")
    assert plans.parse(plan.dump(), "plan.yaml").time == plan.time


def test_times_of_a_plan_do_not_go_into_what_is_made_of_it(slow_before: list[int]) -> None:
    net = _net()
    plan = surgeon.plan(net, "hetconv-p4", SHAPE, time=True)
    (step,) = surgeon.history(surgeon.convert(net, plan))
    assert step.plan is not None
    assert "time" not in step.plan


def test_both_sides_are_timed_with_their_norms_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []
    prepare = bench._prepare
    monkeypatch.setattr(bench, "_prepare", lambda *given: (timed.append(given[2]), prepare(*given))[1])
    surgeon.plan(_net(), "acnet", SHAPE, time=True)
    kinds = [[type(module).__name__ for module in net] for net in timed]
    assert kinds == [["Conv2d", "Identity", "ReLU"] * 3] * 2


def test_what_cannot_be_timed_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no input is known to time the model with"):
        surgeon.plan(tiny.Picky(), "acnet", time=True)
    with pytest.raises(RecipeError, match=r"time\.before"):
        plans.parse(surgeon.plan(_net(), "acnet", SHAPE).dump() + "\ntime: {before: -1}\n", "plan.yaml")


def test_the_commands_time_and_write_no_time_into_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], slow_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_net(), "net.pt")
    assert run_surgeon("convert", "net.pt", "-r", "acnet", "-i", "2,3,16,16", "--time", "-o", "out.pt") == 0
    *_, gained, time, written = capsys.readouterr().out.splitlines()
    assert gained.startswith("gained, once it is fused: parameters ×0.99")
    assert time.startswith("time ×0.25 (4 → 1 ms")
    assert written == "written: out.pt"
    assert run_surgeon("plan", "net.pt", "-r", "acnet", "-i", "2,3,16,16", "--time", "--json") == 0
    assert json.loads(capsys.readouterr().out)["time"]["rounds"] == 15
