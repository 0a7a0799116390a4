"""What follows deployed octave convs goes into their calls: all of it, nothing else, and out again."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks.octave_step import OctaveStep
from surgeon.conv import streams
from surgeon.octave.absorb import undone
from surgeon.one_pass import where
from surgeon.surgery import fold

OVERRIDES = ["rules[1].with.min_size=2"]


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def shaken(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in ((norm.weight, 0.3, 1), (norm.running_var, 0.5, 2), (norm.running_mean, -1, 1)):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return net.double().eval()


class Residual(nn.Module):
    """Two convs, a shortcut and an activation, which a subclass puts together."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.na, self.nb = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.act, self.head = act or nn.ReLU(inplace=True), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.act(self.na(self.a(x)))
        return self.head(self.act(self.nb(self.b(y)) + x))  # type: ignore[no-any-return]


class InPlaceBefore(Residual):
    """The shortcut is changed after the last conv has read it, so this conv may not wait for the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.b(x)
        x.mul_(2)
        return self.head(F.relu(y + x))  # type: ignore[no-any-return]


class ReadBetween(Residual):
    """The sum is read before the activation, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        total = self.b(x) + x
        return self.head(F.relu(total) + total.mean())  # type: ignore[no-any-return]


class OneStreamActivated(Residual):
    """A Hardtanh is none of the activations that a conv can end with."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardtanh(self.b(F.silu(self.stem(x)))))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many calls do more than convolve
    "relu": (Residual, 2),
    "silu": (lambda: Residual(nn.SiLU()), 2),
    "relu6": (lambda: Residual(nn.ReLU6()), 2),
    "hardswish": (lambda: Residual(nn.Hardswish()), 2),
    "another activation": (lambda: Residual(nn.GELU()), 1),
    "changed in between": (InPlaceBefore, 0),
    "read in between": (ReadBetween, 1),
    "clipped": (OneStreamActivated, 0),
}


def octave(net: nn.Module, size: int = 15) -> nn.Module:
    return surgeon.convert(shaken(net), "octave", (2, 3, size, size), overrides=OVERRIDES)


def with_more(net: nn.Module) -> list[str]:
    graph = net.graph
    assert not isinstance(graph, Tensor | nn.Module)
    return [str(node.target) for node in graph.nodes if node.op == "call_module" and len(node.args) > 1]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("form", ["plain", "stacked"])
def test_it_computes_what_the_converted_network_does(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, count = NETS[name]
    net = octave(make())
    blocks = {path: form for path, m in net.named_modules() if isinstance(m, surgeon.nn.OctaveConv)}
    assert blocks
    monkeypatch.setattr("surgeon.surgery.fuse.forms_on", lambda *_: {p: f for p, f in blocks.items() if f != "plain"})
    fused = surgeon.fuse(net)
    assert len(with_more(fused)) == count
    for size in (15, 12):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=memory)
            expected = net.to(memory_format=memory)(x).detach()
            assert relative(fused.to(memory_format=memory)(x), expected) <= 1e-12
            with torch.no_grad():
                assert relative(fused(x), expected) <= 1e-12
                assert relative(undone(fused)(x), expected) <= 1e-12
    assert with_more(undone(fused)) == []
    assert surgeon.verify(net, fused, (2, 3, 15, 15)).verdict == "equivalent"


@pytest.mark.parametrize("form", ["plain", "stacked"])
def test_a_resnet_is_convs_and_nothing_in_between(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = surgeon.convert(
        shaken(torchvision.models.resnet18(weights=None)), "octave", (2, 3, 64, 64), overrides=OVERRIDES
    )
    if form == "stacked":  # as where the network lies on a GPU
        monkeypatch.setattr("surgeon.surgery.fuse.forms_on", lambda net, _: fold.forms_on(net, torch.device("cuda")))
    fused = surgeon.fuse(net)
    steps = [m for m in fused.modules() if isinstance(m, OctaveStep)]
    assert {m.form for m in steps} == ({"stacked"} if form == "stacked" else {"paths"})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(fused(x), net(x)) <= 1e-12
    graph = fused.graph
    assert not isinstance(graph, Tensor | nn.Module)
    first, last = (next(n for n in graph.nodes if n.target == name) for name in ("layer1.0.conv1", "layer2.1.conv2"))
    between = [n for n in graph.nodes if first < n < last]
    others = {n.target for n in between} - {p for p, m in fused.named_modules() if isinstance(m, OctaveStep)}
    assert others == {streams.split, operator.getitem}  # of the plain map that the first shortcut adds
    surgeon.save(net, tmp_path / "net.pt")
    surgeon.save(fused, tmp_path / "fused.pt")
    again = surgeon.load(tmp_path / "fused.pt")
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))
    assert surgeon.verify(surgeon.load(tmp_path / "net.pt"), again, (2, 3, 32, 32)).verdict == "equivalent"


def test_without_a_history_every_conv_is_still_looked_at() -> None:
    net = octave(Residual()).float()
    fused = surgeon.fuse(net)
    vars(fused).pop("surgeon_provenance")
    report = surgeon.verify(net, fused, (2, 3, 15, 15))
    assert report.verdict == "equivalent"
    assert {site.path for site in report.sites} >= {"a", "b"}
    wrong = copy.deepcopy(fused)
    step = wrong.get_submodule("b")
    assert isinstance(step, OctaveStep)
    with torch.no_grad():
        next(step.parameters())[0, 0, 0, 0] += 1e-4
    report = surgeon.verify(net, wrong, (2, 3, 15, 15))
    assert report.verdict == "different"
    assert "b" in {site.path for site in report.sites if site.diverges}


def test_a_step_that_is_called_on_a_map_convolves_it_alone() -> None:
    net = octave(Residual())
    fused = surgeon.fuse(net)
    x = torch.randn(1, 16, 15, 15, dtype=torch.float64)
    with torch.no_grad():
        expected = net.get_submodule("nb")(net.get_submodule("b")(x))
        assert relative(fused.get_submodule("b")(x), expected) <= 1e-12


def test_a_file_of_the_rules_before_opens_and_is_verified_by_them() -> None:
    net = octave(Residual())
    fused = surgeon.fuse(net)
    (step,) = [one for one in surgeon.history(fused) if one.operation == "fuse"]
    assert step.rules == 3
    from dataclasses import replace

    from surgeon.surgery.history import set_history_
    from surgeon.surgery.replay import redo_

    older = redo_(copy.deepcopy(net), [replace(step, rules=2)])
    assert with_more(older) == []
    set_history_(older, (*surgeon.history(net), replace(step, rules=2)))
    assert surgeon.verify(net, older, (2, 3, 15, 15)).verdict == "equivalent"
    set_history_(older, (*surgeon.history(net), step))
    assert surgeon.verify(net, older, (2, 3, 15, 15)).verdict == "different"


@pytest.mark.parametrize("size", [16, 15])
def test_with_the_kernel_in_between_it_computes_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's interpreter where there is no GPU; on one, as it is."""
    pytest.importorskip("triton")
    from surgeon.one_pass import streams_triton

    calls, own = [], streams_triton.finish
    monkeypatch.setattr(streams_triton, "finish", lambda *args: (calls.append(1), own(*args))[1])
    monkeypatch.setattr(where, "on_cpu", True)
    monkeypatch.setattr("surgeon.surgery.fuse.forms_on", lambda net, _: fold.forms_on(net, torch.device("cuda")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = octave(Residual(), size)
    fused = surgeon.fuse(net).to(device, memory_format=torch.channels_last)
    calls.clear()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        made = fused(x.to(device, memory_format=torch.channels_last)).cpu()
        assert relative(made, net(x)) <= 1e-12
    assert calls
