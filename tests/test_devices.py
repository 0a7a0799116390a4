"""Where models lie and inputs go. Fake tensors stand for a GPU: they have a device, and no numbers."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import run_surgeon, shake_
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import surgeon
from surgeon.blocks import Foldable, registry
from surgeon.errors import ModelError
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.draw import Draw
from surgeon.proof.distance import as_double
from surgeon.proof.ulps import Jitter, ulp
from surgeon.surgery import bench, clocks

EXAMPLE = (2, 3, 16, 16)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        second = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        return shake_(nn.Sequential(*first, *second, nn.Conv2d(8, 8, 3, padding=1)).to(dtype)).eval()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.weakref, "getweakrefs", lambda tensor: [])  # a fake tensor has one, of its mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def kinds(tensors: object) -> set[str]:
    return {tensor.device.type for tensor in tensors}  # type: ignore[attr-defined]


# Which device a text names, and what is said where there is none.


@pytest.mark.parametrize("text", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:3", "mps:0", "meta", "cuda:0:0"])
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match=f"{text!r} is not the name of a device. Give cpu, cuda, cuda:1 or mps."):
        devices.named(text)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for text in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ModelError, match=f"no {text[:4].rstrip(':')} device is available to torch here"):
            devices.named(text)
    for is_built, why in ((True, "torch finds no GPU, or no driver for it"), (False, "built without CUDA")):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda is_built=is_built: is_built)
        with pytest.raises(ModelError, match=why):
            devices.named("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.named("cuda:1") == torch.device("cuda", 1)
    assert devices.named("cuda") == torch.device("cuda")
    with pytest.raises(ModelError, match=re.escape("there is no device cuda:2 here: there are cuda:0 to cuda:1")):
        devices.named("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match=re.escape("there is no device cuda:1 here: cuda:0 is the only one")):
        devices.named("cuda:1")


def test_every_command_that_runs_a_network_checks_the_device_before_it_loads_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for command in (
        ("convert", "nowhere.pt", "--recipe", "acnet"),
        ("fuse", "nowhere.pt"),
        ("verify", "nowhere.pt", "nowhere.pt"),
        ("survey", "nowhere.pt"),
        ("plan", "nowhere.pt", "--recipe", "acnet"),
        ("bench", "nowhere.pt"),
    ):
        assert run_surgeon(*command, "--device", "cuda") == 2, command
        printed = capsys.readouterr()
        said = "surgeon: no cuda device is available to torch here: torch finds no GPU, or no driver for it. "
        assert (printed.out, printed.err) == ("", f"{said}Give --device cpu, or leave it out.\n")


def test_a_model_that_does_not_fit_is_one_sentence() -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def to(self, *args: object, **kwargs: object) -> nn.Module:  # type: ignore[override]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with pytest.raises(ModelError, match="the model cannot be moved to cuda: CUDA out of memory"):
        devices.moved(Full(), torch.device("cuda"))


# Where a model lies.


def test_a_model_lies_where_its_parameters_do() -> None:
    model = net()
    assert devices.of(model) == torch.device("cpu")
    assert devices.of(model.to("meta")) == torch.device("meta")
    assert devices.of(nn.ReLU()) is None
    assert devices.of(nn.BatchNorm2d(3, affine=False)) == torch.device("cpu")
    model[0].to_empty(device="cpu")
    assert devices.of(model) is None


@pytest.mark.usefixtures("fake")
def test_a_copy_is_made_only_of_what_lies_elsewhere() -> None:
    model = nn.Conv2d(3, 4, 3, device="cuda")
    assert devices.on(model, torch.device("cuda", model.weight.device.index)) is model
    copied = devices.on(model, devices.CPU)
    assert copied is not model
    assert (copied.weight.device.type, model.weight.device.type) == ("cpu", "cuda")
    assert copied.weight.requires_grad
    assert devices.on(copied, devices.CPU) is copied
    without_numbers = nn.Conv2d(3, 4, 3, device="meta")
    assert devices.on(without_numbers, devices.CPU) is without_numbers


# Where inputs go.


@pytest.mark.usefixtures("fake")
def test_inputs_go_where_the_model_is() -> None:
    model = nn.Conv2d(3, 4, 3, device="cuda", dtype=torch.float16)
    drawn = Inputs((Draw((1, 3, 8, 8)), [Draw((2,), torch.int64)]), {"mask": Draw((1, 8), torch.bool)}).drawn(0)
    assert kinds(drawn.tensors) == {"cpu"}
    given = drawn.cast_for(model)
    assert kinds(given.tensors) == {"cuda"}
    assert [t.dtype for t in given.tensors] == [torch.float16, torch.int64, torch.bool]
    assert model(given.args[0]).device.type == "cuda"
    assert drawn.cast_for(model, torch.float64).tensors[0].dtype == torch.float64
    assert kinds(given.cast_for(nn.Conv2d(3, 4, 3)).tensors) == {"cpu"}


@pytest.mark.usefixtures("fake")
def test_inputs_stay_where_they_are_for_a_model_on_several_devices_or_on_none() -> None:
    several = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, device="cuda"))
    for model in (several, nn.ReLU()):
        inputs = Inputs((torch.zeros(1, 3, 8, 8, device="cuda"), torch.zeros(1)))
        assert [t.device.type for t in inputs.cast_for(model).tensors] == ["cuda", "cpu"]


@pytest.mark.usefixtures("fake")
def test_inputs_without_numbers_stay_so() -> None:
    inputs = Inputs((torch.zeros(1, 3, 8, 8, device="meta"),))
    assert kinds(inputs.cast_for(nn.Conv2d(3, 4, 3, device="cuda")).tensors) == {"meta"}


@pytest.mark.usefixtures("fake")
def test_more_inputs_of_a_kind_lie_where_that_lies() -> None:
    inputs = Inputs((torch.zeros(1, 3, 8, 8, device="cuda"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "item", lambda self: 1.0)  # a fake tensor has no mean
        assert kinds(t for one in inputs.alike(2, 0) for t in one.tensors) == {"cuda"}


def test_numbers_are_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    draw = Inputs((Draw((2, 3)), Draw((2,), torch.int64), Draw((2,), torch.complex64)))
    expected = draw.drawn(3).tensors
    with torch.device("meta"):
        found = draw.drawn(3).tensors
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_without_numbers_is_surveyed_and_planned_at_a_shape() -> None:
    model = net().to("meta")
    assert [site.size for site in surgeon.survey(model, EXAMPLE).sites] == [(16, 16)] * 3
    plan = surgeon.plan(model, "acnet", EXAMPLE)
    assert kinds(surgeon.convert(model, plan).parameters()) == {"meta"}


# Blocks and measures on a device.


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("acblock", {"init": "takeover"}),
        ("acblock", {"init": "split"}),
        ("acblock", {"init": "scratch"}),
        ("hetconv", {"p": 2, "layout": "block"}),
        ("hetconv", {"p": 2, "layout": "interleaved", "init": "scratch"}),
        ("octave", {"alpha_in": 0.5, "alpha_out": 0.5}),
    ],
)
def test_a_block_is_made_run_and_folded_where_its_conv_lies(name: str, options: dict[str, object]) -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1, device="cuda"), torch.zeros(1, 8, 8, 8, device="cuda")
    kind = registry()[name]
    block = kind.from_conv(conv, kind.Options(**options), norm=None, generator=torch.Generator().manual_seed(0)).eval()
    assert kinds((*block.parameters(), *block.buffers())) == {"cuda"}
    assert block(x).device.type == "cuda"
    if isinstance(block, Foldable):
        assert block.fold()(x).device.type == "cuda"


@pytest.mark.usefixtures("fake")
def test_float64_copies_jitter_and_units_lie_where_the_model_lies() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="cuda"), nn.BatchNorm2d(4, device="cuda"))
    for cast in (as_double, Jitter(0), Jitter(0, keeps_dtype=True)):
        made = shadow(model, cast)
        assert kinds((*made.parameters(), *made.buffers())) == {"cuda"}
    assert ulp(model[0].weight).device.type == "cuda"


def test_what_has_no_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "NO_FLOAT64", ("cpu",))
    with pytest.raises(ModelError, match="the model lies on cpu, which has no float64"):
        surgeon.convert(net(), "acnet", EXAMPLE)


def test_on_a_device_without_float64_commands_stay_on_the_cpu_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.zeros(1))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: None)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: None)
    surgeon.save(net(), tmp_path / "net.pt")
    assert run_surgeon("survey", tmp_path / "net.pt", "--input", "1,3,16,16", "--device", "mps") == 0
    assert "mps has no float64, which surgeon needs for its proofs" in capsys.readouterr().err


# Files.


def test_a_file_is_written_from_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = net(), []

    def on(given: nn.Module, device: torch.device) -> nn.Module:
        copied.append((given, device))
        return net()

    monkeypatch.setattr(devices, "on", on)
    for name in ("net.pt", "net.safetensors"):
        surgeon.save(model, tmp_path / name)
    assert copied == [(model, devices.CPU)] * 2


# Clocks.


@pytest.mark.parametrize("is_gpu", [True, False])
def test_time_on_a_device_that_is_waited_for_is_taken_when_it_has_finished(
    is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    clock = time.perf_counter

    def read() -> float:
        done.append("read the clock")
        return clock()

    monkeypatch.setattr(time, "perf_counter", read)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_forward_hook(lambda *_: done.append("ran"))
    host = clocks.HostClock(torch.device("mps"), lambda: done.append("waited")) if is_gpu else clocks.HostClock()
    inputs, setting = Inputs((torch.rand(EXAMPLE),)), bench.Setting(2, 1, train=True)
    (timing,) = bench.run([("net", model)], inputs, [setting], rounds=3, clock_of=lambda place: host)
    timed = done[done.index("read the clock") :]
    after_runs = {then for one, then in itertools.pairwise(timed) if one == "ran"}
    assert after_runs == ({"waited"} if is_gpu else {"ran", "read the clock"})
    assert (timing.device, timing.peak_bytes is None) == (("mps", True) if is_gpu else ("cpu", False))


def test_the_clock_of_a_device() -> None:
    assert clocks.of(torch.device("cpu")).name == "cpu"
    assert clocks.of(torch.device("mps")).name == "mps"


# With a GPU.


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@gpu
@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch", "hetconv-p4", "octave"])
def test_on_a_gpu_a_conversion_gives_the_numbers_that_it_gives_on_the_cpu(recipe: str, tmp_path: Path) -> None:
    expected = surgeon.convert(net(), recipe, EXAMPLE)
    model = net().cuda()
    found = surgeon.convert(model, recipe, EXAMPLE)
    assert kinds((*found.parameters(), *found.buffers())) == {"cuda"}
    fused = surgeon.fuse(found)
    assert surgeon.verify(found, fused, EXAMPLE).equivalent
    assert surgeon.verify(found, fused.cpu(), EXAMPLE).equivalent
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key].cpu(), value, rtol=3e-7, atol=1e-12)
    surgeon.save(found, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    assert kinds(again.parameters()) == {"cpu"}


@gpu
def test_on_a_gpu_the_whole_command_line_works(tmp_path: Path) -> None:
    start, made, fused = tmp_path / "net.pt", tmp_path / "made.pt", tmp_path / "fused.pt"
    torch.save(shake_(torchvision.models.resnet18(weights=None), gently=True), start)
    how = ("--input", "2,3,64,64", "--device", "cuda")
    assert run_surgeon("convert", start, "--recipe", "acnet", "-o", made, *how) == 0
    assert run_surgeon("fuse", made, "-o", fused, *how) == 0
    assert run_surgeon("verify", made, fused, *how) == 0
    assert run_surgeon("bench", start, fused, "--rounds", "3", *how) == 0


@gpu
def test_on_a_gpu_no_random_state_moves() -> None:
    torch.cuda.init()
    model = nn.Sequential(net(), nn.Dropout(0.5)).cuda()
    before = torch.cuda.get_rng_state()
    surgeon.fuse(surgeon.convert(model, "acnet-scratch", EXAMPLE))
    assert torch.equal(torch.cuda.get_rng_state(), before)
