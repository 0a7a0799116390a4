"""Clocks: how time is taken on CUDA, with a device that only writes down what it is told."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon, shake_
from torch import Tensor, nn

from surgeon.analysis import example as examples
from surgeon.errors import CaptureError
from surgeon.surgery import bench
from surgeon.surgery.clocks import CudaClock
from surgeon.surgery.trials import Setting, Trials

INPUTS = examples.make((1, 3, 8, 8))
PLACE = torch.device("cuda", 1)


class Device:
    """Stands for `torch.cuda`: runs take as long as their model says, and everything is written down in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.now = 0.0  # milliseconds, as events count
        self.bytes = 1000
        self.peak = 0
        self.Event = lambda enable_timing: Event(self)
        self.CUDAGraph = lambda: Graph(self)

    def get_device_name(self, place: torch.device) -> str:
        return "a fake"

    @contextlib.contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        assert place == PLACE
        yield

    def synchronize(self, place: torch.device) -> None:
        self.told.append("wait")

    def reset_peak_memory_stats(self, place: torch.device) -> None:
        self.peak = self.bytes

    def memory_allocated(self, place: torch.device) -> int:
        return self.bytes

    def max_memory_allocated(self, place: torch.device) -> int:
        return self.peak

    def Stream(self, place: torch.device) -> Stream:  # noqa: N802
        return Stream()

    def current_stream(self, place: torch.device) -> Stream:
        return Stream()

    @contextlib.contextmanager
    def stream(self, side: Stream) -> Iterator[None]:
        self.told.append("aside")
        yield
        self.told.append("back")

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.told.append("capture")
        before = self.now
        yield
        graph.takes, self.now = (self.now - before) / 4, before  # kernels alone; capturing runs none of them
        self.told.append("captured")


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.told.append("event")
        self.at = self.device.now

    def synchronize(self) -> None:
        self.device.told.append("wait for event")

    def elapsed_time(self, other: Event) -> float:
        assert self.device.told[-1] == "wait for event"  # the time of an event is not known before
        return other.at - self.at


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    takes = 0.0

    def __init__(self, device: Device) -> None:
        self.device = device

    def replay(self) -> None:
        self.device.told.append("replay")
        self.device.now += self.takes


class Takes(nn.Module):
    """A conv that takes so many milliseconds on a device."""

    def __init__(self, device: Device, milliseconds: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tell = [device, milliseconds]

    def __deepcopy__(self, memo: dict[int, object]) -> Takes:
        return Takes(*self.tell)

    def forward(self, x: Tensor) -> Tensor:
        device, milliseconds = self.tell
        device.now += milliseconds
        device.peak = max(device.peak, device.bytes + 77)
        device.told.append(f"ran {milliseconds}")
        return self.conv(x)


def timed(device: Device, setting: Setting, **models: float) -> tuple[bench.Timing, ...]:
    named = [(name, Takes(device, takes)) for name, takes in models.items()]
    return bench.run(named, INPUTS, [setting], rounds=4, clock_of=lambda place: CudaClock(PLACE, device))


def test_events_of_the_device_tell_the_time() -> None:
    device = Device()
    one, other = timed(device, Setting(2, 1), a=100.0, b=25.0)
    assert (one.seconds, other.seconds) == (pytest.approx(0.1), pytest.approx(0.025))
    assert other.time_ratio == pytest.approx(0.25)
    assert (one.device, one.dtype, one.peak_bytes) == ("cuda:1 (a fake)", "float32", 77)
    ends = [i for i, said in enumerate(device.told) if said == "wait for event"]
    for end in ends:  # idle, event, nothing but runs of one model, event
        start = max(i for i in range(end - 1) if device.told[i] == "event")
        assert device.told[start - 1] == "wait"
        assert len(set(device.told[start + 1 : end - 1])) == 1


def test_a_device_is_warm_before_it_counts() -> None:
    device = Device()
    timed(device, Setting(1, 1), a=1.0)
    counted = 4 + 3  # rounds, and what tells how often to repeat
    starts = [i for i, (one, then) in enumerate(itertools.pairwise(device.told)) if (one, then) == ("wait", "event")]
    assert device.told[: starts[-counted]].count("ran 1.0") >= 300


def test_a_run_that_takes_no_time_that_events_can_tell_is_warm_some_day() -> None:
    device, calls = Device(), []
    CudaClock(PLACE, device).warm_up(lambda: calls.append(1))
    assert 100 < len(calls) < 1000


def test_graphs_are_captured_once_after_runs_on_a_stream_aside_and_replayed() -> None:
    device = Device()
    plain, captured = timed(device, Setting(1, 1), a=60.0)[0], timed(device, Setting(1, 1, graphs=True), a=60.0)[0]
    assert captured.seconds == pytest.approx(plain.seconds / 4)
    told = device.told[device.told.index("aside") :]
    back, first = told.index("back"), told.index("capture")
    assert told[1:back] == ["ran 60.0"] * 3
    assert told[back : first + 3] == ["back", "wait", "capture", "ran 60.0", "captured"]
    assert "ran 60.0" not in told[first + 3 :]
    assert told.count("capture") == 1
    assert captured.peak_bytes == 77  # of a run as it is: replaying needs no memory


@pytest.mark.parametrize(
    ("setting", "device", "said"),
    [
        (Setting(1, 1, graphs=True), "cpu", "captured on CUDA devices, and the models run on cpu. Give --device cuda"),
        (Setting(1, 1, graphs=True, compiled=True, mode="max-autotune"), "cuda", "Take --graphs or this mode away"),
        (Setting(1, 1, train=True, dtype="float16"), "cpu", "is not trained that way. Take --autocast fp16"),
        (Setting(1, 1, train=True, dtype="bfloat16"), "cuda", "Take --autocast bf16"),
        (Setting(1, 1, dtype="bfloat16", autocast="bfloat16"), "cpu", "nothing for autocast to cast. Take one of the"),
    ],
)
def test_what_does_not_fit_together_is_refused(setting: Setting, device: str, said: str) -> None:
    with pytest.raises(CaptureError) as caught:
        bench.check([setting], torch.device(device))
    assert said in str(caught.value)


@pytest.mark.parametrize("setting", Trials(compiled=True, graphs=True, modes=("default", "reduce-overhead")).settings)
def test_what_is_asked_for_together_fits_on_cuda(setting: Setting) -> None:
    assert setting.refusal(PLACE) is None


def test_other_modes_are_in_graphs_of_their_own() -> None:
    settings = Trials((4,), (1,), modes=("default", "max-autotune"), graphs=True).settings
    ways = [str(one).removeprefix("batch 4, 1 thread, NCHW").removeprefix(", ") for one in settings]
    assert ways == ["", "compiled", "compiled (max-autotune)", "CUDA graph", "compiled, CUDA graph"]


def test_a_mode_is_given_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def compile(model: nn.Module, *, dynamic: bool, mode: str | None) -> nn.Module:
        asked.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    settings = Trials(compiled=True, modes=("default", "max-autotune")).settings
    bench.run([("a", nn.Conv2d(3, 4, 3))], INPUTS, settings, rounds=3)
    assert asked == [None, "max-autotune"]


class Sees(nn.Module):
    """Writes down in which dtype its conv gives its result, and whether torch casts."""

    def __init__(self, seen: list[object]) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 3), seen

    def __deepcopy__(self, memo: dict[int, object]) -> Sees:
        return Sees(self.seen)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        self.seen.append((x.dtype, self.conv.weight.dtype, made.dtype, torch.is_grad_enabled()))
        return made


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (Setting(1, 1, dtype="bfloat16"), (torch.bfloat16, torch.bfloat16, torch.bfloat16, False)),
        (Setting(1, 1, autocast="bfloat16"), (torch.float32, torch.float32, torch.bfloat16, False)),
        (Setting(1, 1, autocast="bfloat16", train=True), (torch.float32, torch.float32, torch.bfloat16, True)),
    ],
)
def test_models_run_in_the_dtype_that_is_asked_for(setting: Setting, seen: tuple[object, ...]) -> None:
    found: list[object] = []
    model = Sees(found)
    (timing,) = bench.run([("a", model)], INPUTS, [setting], rounds=3)
    assert found[-1] == seen
    assert timing.dtype == str(seen[1]).removeprefix("torch.")
    assert model.conv.weight.dtype == torch.float32  # it was copied


def test_the_command_line_says_in_one_line_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "net.pt")
    for wrong in (("--graphs",), ("--train", "--half"), ("--half", "--autocast", "bf16"), ("--half", "--bf16")):
        assert run_surgeon("bench", "net.pt", "--input=1,3,8,8", *wrong) == 2, wrong
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
    how = ("bench", "net.pt", "--input=1,3,8,8", "--rounds=3", "--train", "--autocast=bf16")
    assert run_surgeon(*how, "--json") == 0
    (timing,) = json.loads(capsys.readouterr().out)
    assert (timing["device"], timing["dtype"], timing["setting"]["autocast"]) == ("cpu", "float32", "bfloat16")
    assert run_surgeon(*how) == 0
    assert "autocast bfloat16, training step" in capsys.readouterr().out


# With a GPU.


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@gpu
@pytest.mark.parametrize("train", [False, True])
def test_on_a_gpu_a_captured_run_computes_what_a_run_computes(train: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = shake_(net, gently=True).cuda().eval()
    settings = [Setting(4, 1, graphs=graphs, channels_last=True, train=train) for graphs in (False, True)]
    timings = bench.run([("a", model), ("again", model)], INPUTS, settings, rounds=5)
    assert all(0 < one.seconds < 1 and one.peak_bytes for one in timings)
    place = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4, 3, 8, 8, device=place)
    with torch.inference_mode():
        replay = CudaClock(place).captured(lambda: model(x))
        x.copy_(torch.randn_like(x))
        torch.testing.assert_close(replay(), model(x))


@gpu
@pytest.mark.parametrize("how", [("--half", "--graphs"), ("--train", "--autocast=bf16", "--graphs"), ("--compile",)])
def test_on_a_gpu_the_command_line_measures(how: tuple[str, ...], tmp_path: Path) -> None:
    net = shake_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), gently=True)
    torch.save(net, tmp_path / "net.pt")
    given = (str(tmp_path / "net.pt"), "--input=2,3,32,32", "--device=cuda", "--rounds=3")
    assert run_surgeon("bench", *given, *how) == 0
