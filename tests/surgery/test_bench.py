"""bench: what is measured and how it is judged, on a clock that the tests turn; and that folding norms is exact."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import narrow_torchvision, relative, run_surgeon, shake_
from small_networks import small_densenet
from tiny import SHAPE, ConvNorm
from torch import Tensor, nn

import surgeon
from surgeon.analysis import example as examples
from surgeon.analysis.network import Network
from surgeon.errors import CaptureError
from surgeon.models.cost import measure
from surgeon.surgery import bench, clocks
from surgeon.surgery.bench import Setting
from surgeon.surgery.fold import fold_norms_

INPUTS = examples.make((1, 3, 8, 8))


class Clock:
    """Stands still but for what the models take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(clocks.time, "perf_counter", clock)
    return clock


class Takes(nn.Module):
    """A conv that takes as long as it is told, call by call."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float], width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.calls = 0
        self.tell = [clock, seconds]

    def __deepcopy__(self, memo: dict[int, object]) -> Takes:
        return Takes(*self.tell, width=self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        clock, seconds = self.tell
        clock.now += seconds(self.calls)
        self.calls += 1
        return self.conv(x)


def test_ratios_are_those_of_the_clock_and_of_the_costs(clock: Clock) -> None:
    models = [("a", Takes(clock, lambda i: 0.2)), ("b", Takes(clock, lambda i: 0.05, width=2))]
    one, other = bench.run(models, INPUTS, [Setting(4, 1)], rounds=5)
    assert (one.model, one.form, one.time_ratio, one.macs_ratio) == ("a", "as it is", 1.0, 1.0)
    assert other.time_ratio == pytest.approx(0.25)
    assert other.macs_ratio == 0.5
    assert other.seconds == pytest.approx(0.05)
    assert other.per_second == pytest.approx(4 / 0.05)
    assert one.macs == measure(nn.Conv2d(3, 4, 3), [torch.empty(4, 3, 8, 8)]).macs
    assert one.is_believable
    assert other.is_believable


def test_short_runs_are_repeated_until_the_clock_can_tell(clock: Clock) -> None:
    calls = []
    bench.run([("a", Takes(clock, lambda i: calls.append(i) or 0.001))], INPUTS, [Setting(1, 1)], rounds=3)
    assert max(calls) >= 3 * 50


def test_a_spread_that_is_too_wide_is_said(clock: Clock) -> None:
    models = [("a", Takes(clock, lambda i: 0.1)), ("b", Takes(clock, lambda i: 0.1 + 0.1 * (i % 3)))]
    one, other = bench.run(models, INPUTS, [Setting(1, 1)], rounds=9)
    assert one.is_believable
    assert not other.is_believable
    assert other.quartiles[0] < other.time_ratio < other.quartiles[1]


def test_a_drift_that_hits_both_does_not_move_the_ratio(clock: Clock) -> None:
    """The reason for taking turns: the machine gets slower by a half while they run."""

    def drifting(seconds: float) -> Callable[[int], float]:
        return lambda i: seconds * (1 + clock.now / 40)

    models = [("a", Takes(clock, drifting(0.1))), ("b", Takes(clock, drifting(0.05)))]
    _, other = bench.run(models, INPUTS, [Setting(1, 1)], rounds=60)
    assert other.time_ratio == pytest.approx(0.5, rel=0.01)
    assert other.spread > 0.1
    assert other.is_believable


def test_where_there_are_norms_the_folded_forms_are_measured_too() -> None:
    plain, normed = nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Sequential(ConvNorm())
    timings = bench.run([("a", plain), ("b", normed)], examples.make(SHAPE), [Setting(1, 1)], rounds=3)
    assert [(one.model, one.form) for one in timings] == [(m, f) for f in ("as it is", "folded") for m in ("a", "b")]
    assert all(one.time_ratio == 1 for one in timings if one.model == "a")
    timings = bench.run([("b", normed)], examples.make(SHAPE), [Setting(1, 1, train=True)], rounds=3)
    assert [one.form for one in timings] == ["as it is"]  # folded norms cannot be trained


@pytest.mark.parametrize("setting", [Setting(2, 1), Setting(2, 1, channels_last=True), Setting(2, 1, train=True)])
def test_the_models_stay_as_they_are(setting: Setting) -> None:
    model = shake_(nn.Sequential(ConvNorm(), ConvNorm())).train()
    before = copy.deepcopy(model.state_dict())
    threads = torch.get_num_threads()
    bench.run([("a", model)], examples.make(SHAPE), [setting], rounds=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.get_num_threads() == threads


def test_every_combination_that_is_asked_for() -> None:
    settings = bench.Trials((1, 8), (1, 2), channels_last=True, compiled=True).settings
    assert len(settings) == len(set(settings)) == 16
    assert str(settings[-1]) == "batch 8, 2 threads, channels_last, compiled"
    assert bench.Trials(train=True).settings == [Setting(1, torch.get_num_threads(), train=True)]


def test_compiled_models_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))  # inductor takes 20 s
    models = [(str(i), nn.Conv2d(3, 4 + i, 3)) for i in range(10)]
    timings = bench.run(models, INPUTS, [Setting(1, 1, compiled=True)], rounds=3)
    assert all(timing.seconds > 0 for timing in timings)
    assert len(seen) == 10  # once each, and not again while they are timed


class Grows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(32, 1024, 1024).sum() + x


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_that_of_a_run() -> None:
    (timing,) = bench.run([("a", Grows())], INPUTS, [Setting(1, 1)], rounds=3)
    assert 128e6 < timing.peak_bytes < 160e6


def test_a_model_that_does_not_run_is_named() -> None:
    with pytest.raises(CaptureError, match=r"b does not run \(batch 1, 1 thread, NCHW\)"):
        bench.run([("a", nn.Conv2d(3, 4, 3)), ("b", nn.Conv2d(5, 4, 3))], INPUTS, [Setting(1, 1)])


def _first_stages(name: str, options: dict[str, object]) -> dict[str, object]:
    match = {"kernel": 3, "name": ["layer1.**", "layer2.**"]}
    return {"surgeon": 1, "title": "T", "rules": [{"swap": name, "match": match, "with": options}]}


RECIPES = {
    "plain": None,
    "acblock": _first_stages("acblock", {}),
    "hetconv": _first_stages("hetconv", {"p": 4}),
    "hetconv, best": _first_stages("hetconv", {"p": 4, "layout": "best"}),
}
NETS = {
    "densenet": (small_densenet, "plain"),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(weights=None), "plain"),
    **{f"resnet18, {name}": (lambda: narrow_torchvision("resnet18"), name) for name in RECIPES},
}


@pytest.mark.parametrize("name", NETS)
def test_folding_norms_keeps_the_function(name: str) -> None:
    torch.manual_seed(0)
    build, recipe = NETS[name]
    model = shake_(build(), 1, gently=True).double().eval()
    if RECIPES[recipe] is not None:
        model = surgeon.convert(model, RECIPES[recipe], (1, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad():
        before = model(x)
        folded = fold_norms_(Network(model))
        assert relative(model(x), before) <= 1e-12
    assert folded
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == norms - len(folded)
    if name.startswith("resnet18, h"):
        assert len(folded) == 20  # those behind HetConvs too


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    torch.save(net, "net.pt")
    torch.save(surgeon.convert(net, "hetconv-p4", (1, 3, 12, 12)), "thin.pt")
    arguments = ("bench", "net.pt", "thin.pt", "--input=1,3,12,12", "--batch=1", "--batch=2", "--rounds=3")
    assert run_surgeon(*arguments, "--json") == 0
    timings = json.loads(capsys.readouterr().out)
    assert len(timings) == 2 * 2 * 2
    assert [one["setting"]["batch"] for one in timings] == [1] * 4 + [2] * 4
    thin = [one for one in timings if one["model"] == "thin.pt"]
    assert all(0 < one["macs_ratio"] < 1 for one in thin)
    assert run_surgeon(*arguments) == 0
    out = capsys.readouterr().out
    assert "batch 2, 1 thread, NCHW" in out
    assert "× MACs" in out
    assert run_surgeon("bench", "net.pt", "nte.pt") == 2
    assert run_surgeon("bench", "net.pt", "net.pt", "--rounds=1") == 2
