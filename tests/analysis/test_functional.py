"""Functional convolutions with a parameter are convs like any other; with a computed weight they stay, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from helpers import relative, shake_
from tiny import SHAPE
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis import program
from surgeon.analysis.rewritten import Rewritten
from surgeon.blocks import registry


class Weighted(nn.Module):
    """Parameters of its own, and what is done with them."""

    def __init__(self, run: Callable[[Weighted, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 3, 3)) for _ in range(2)])
        self.bn, self.run = nn.BatchNorm2d(4), run
        self.register_buffer("kept", torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Inner(nn.Module):
    """The functional conv is deeper down, in a module that can be followed, in one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Weighted(lambda m, x: m.bn(F.conv2d(x, m.weight, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() < 1e9 else x


LIFTED: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "alone": (tiny.AffineByHand, ["conv2d"], ""),
    "by position": (lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, m.bias, (2, 1), (1, 1))), ["conv2d"], ""),
    "with a norm": (
        lambda: Weighted(lambda m, x: F.relu(m.bn(F.conv2d(x, m.weight, m.bias, padding=1)))), ["conv2d"], "bn"),
    "as torch.conv2d": (
        lambda: Weighted(lambda m, x: torch.conv2d(x, weight=m.weight, padding="same")), ["conv2d"], ""),
    "dilated": (lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, padding=2, dilation=2)), ["conv2d"], ""),
    "in a list": (
        lambda: Weighted(lambda m, x: F.conv2d(F.conv2d(x, m.more[0], padding=1), m.more[1], padding=1)),
        ["conv2d", "conv2d_1"], ""),
    "deeper down": (Inner, ["inner.conv2d"], "inner.bn"),
}  # fmt: skip


def network(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return shake_(build().double()).eval()


def x() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", LIFTED)
def test_an_acblock_keeps_the_function_and_folds_back(name: str) -> None:
    build, paths, norm = LIFTED[name]
    net = network(build)
    plan = surgeon.plan(net, "acnet", SHAPE)
    functional = [entry for entry in plan.convs if entry.functional]
    assert [entry.path for entry in functional] == paths
    assert all(entry.swap == "acblock" and entry.macs.before > 0 for entry in functional)
    assert [entry.takes_norm for entry in functional] == [(norm,) if norm else ()] * len(paths)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    converted = surgeon.convert(net, plan)
    fused = surgeon.fuse(converted)
    with torch.no_grad():
        assert relative(converted(x()), net(x())) <= 1e-12
        assert relative(fused(x()), net(x())) <= 1e-12
    assert surgeon.verify(net, fused, SHAPE).equivalent
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    gone = {entry.functional.weight.rpartition(".")[2] for entry in functional}
    assert not gone & {key for key in converted.state_dict() if "." not in key and key in gone}
    module = fused.get_submodule(paths[0])
    assert isinstance(module, nn.Conv2d)
    module.weight.data[0, 0, 0, 0] += 1e-6
    assert not surgeon.verify(net, fused, SHAPE).equivalent


@pytest.mark.parametrize("block", registry())
def test_every_block_can_stand_there(block: str) -> None:
    net = network(LIFTED["with a norm"][0])
    options = {"hetconv": {"p": 2}, "octave": {"min_size": 1}}.get(block, {})
    rule = {"swap": block, "with": options}
    converted = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [rule]}, SHAPE)
    assert type(converted.get_submodule("conv2d")) is registry()[block]
    with torch.no_grad():
        assert converted(x()).shape == net(x()).shape


STAYS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a computed weight": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight / m.weight.norm(), padding=1)),
        "conv2d", "computed during the forward pass"),
    "a computed bias": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, m.bias * 2, padding=1)),
        "conv2d", "computed during the forward pass"),
    "a weight that is a buffer": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.kept, padding=1)), "conv2d", "is a buffer"),
    "padding by the shape of the weight": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, padding=m.weight.shape[-1] // 2)),
        "conv2d", "its geometry is computed during the forward pass"),
    "groups by the shape of the input": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, padding=1, groups=x.shape[1] // 4)),
        "conv2d", "its geometry is computed during the forward pass"),
    "one map alone": (
        lambda: Weighted(lambda m, x: F.conv2d(x[0], m.weight, padding=1)[None].expand_as(x)),
        "conv2d", "without a batch dimension"),
    "a weight that is read twice": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, padding=1) * m.weight.mean()), "conv2d", "2 steps read"),
    "Python that cannot be followed": (
        lambda: Weighted(lambda m, x: F.conv2d(x, m.weight, padding=1) if x.mean() < 1e9 else x),
        "weight", "not be traced"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_become_a_module_stays_and_the_plan_says_why(name: str) -> None:
    build, path, reason = STAYS[name]
    net = nn.Sequential(network(build), nn.Conv2d(4, 4, 3, padding=1).double())
    entries = surgeon.plan(net, "acnet", SHAPE).convs
    entry = next(entry for entry in entries if entry.path.endswith(path))
    assert entry.skip
    assert len(entries) == 2  # and the conv behind it: nothing stands there twice
    assert reason in entry.skip
    converted = surgeon.convert(net, "acnet", SHAPE)
    with torch.no_grad():
        assert relative(converted.eval()(x()), net.eval()(x())) <= 1e-12


def test_the_weight_of_a_conv_module_is_not_counted_twice() -> None:
    assert [site.path for site in surgeon.survey(tiny.WeightReadOnly(), SHAPE).sites] == ["conv", "spare"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_it_is_stored_and_opens_again(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(tiny.AffineByHand)
    converted = surgeon.convert(net, "acnet", SHAPE)
    surgeon.save(converted, tmp_path / f"net{suffix}")
    if suffix == ".pt":
        again = surgeon.load(tmp_path / "net.pt")
    else:
        again = surgeon.load(tmp_path / "net.safetensors", arch="tiny:AffineByHand")
    assert isinstance(again, Rewritten)
    with torch.no_grad():
        assert torch.equal(again.eval()(x()), converted(x()))


def test_what_goes_wrong_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(LIFTED["with a norm"][0])
    before, kind = copy.deepcopy(net.state_dict()), type(net)
    compiled = program.compiled
    monkeypatch.setattr(program, "compiled", lambda data: lambda module, x: 2 * compiled(data)(module, x))
    with pytest.raises(surgeon.errors.CaptureError):
        surgeon.convert_(net, "acnet", SHAPE)
    assert type(net) is kind
    assert list(net.state_dict()) == list(before)
    with torch.no_grad():
        assert net(x()).isfinite().all()


def test_it_trains() -> None:
    converted = surgeon.convert(network(tiny.AffineByHand), "acnet", SHAPE).train()
    converted(x()).square().sum().backward()
    block = converted.get_submodule("conv2d")
    assert block.square_conv.weight.grad.abs().sum() > 0


class FreezesItsKernel(tiny.AffineByHand):
    def train(self, mode: bool = True) -> FreezesItsKernel:
        self.weight.requires_grad_(mode)
        return super().train(mode)


def test_a_kernel_that_the_mode_of_its_class_reads_stays_where_it_is() -> None:
    [entry] = [one for one in surgeon.plan(network(FreezesItsKernel), "acnet", SHAPE).convs if one.functional]
    assert entry.skip == "FreezesItsKernel has its own train, which reads 'weight'"
