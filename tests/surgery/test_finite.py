"""Numbers that a dtype does not hold, and numbers that are none, are named before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.errors import PlanError

SHAPE = (2, 8, 8, 8)
RECIPES = {
    "acblock": {"swap": "acblock"},
    "octave": {"swap": "octave", "with": {"min_size": 1}},
    "hetconv": {"swap": "hetconv", "with": {"p": 2}},
}
FOLDED = {"acblock": "0 cannot be folded: its", "octave": "0 cannot be folded with 1: its"}


def made(block: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    net = nn.Sequential(*layers).eval().to(dtype)
    return surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [RECIPES[block]]}, SHAPE)


def norm_of(net: nn.Module) -> nn.BatchNorm2d:
    return next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))


def copied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def unchanged(net: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = net.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k].isnan(), v.isnan()) for k, v in before.items())


WIDER = {
    torch.float16: ("65504, the largest number of float16", r"model.bfloat16\(\) or model.float\(\)"),
    torch.bfloat16: ("3.38953e\\+38, the largest number of bfloat16", r"model.double\(\)"),
    torch.float32: ("3.40282e\\+38, the largest number of float32", r"model.double\(\)"),
    torch.float64: ("1.79769e\\+308, the largest number of float64", "Make the weights of its norm smaller"),
}


@pytest.mark.parametrize("dtype", WIDER, ids=str)
@pytest.mark.parametrize("block", FOLDED)
def test_a_fold_beyond_its_dtype_names_the_conv(block: str, dtype: torch.dtype) -> None:
    """γ is near the largest number, and σ is small: the product is beyond it."""
    net = made(block, dtype)
    with torch.no_grad():
        norm_of(net).weight.fill_(torch.finfo(dtype).max / 2)
        norm_of(net).running_var.fill_(0)
    before, (most, todo) = copied(net), WIDER[dtype]
    for fuse in (surgeon.fuse, surgeon.fuse_):
        with pytest.raises(PlanError, match=rf"{FOLDED[block]} weight would be beyond {most}\. .*{todo}"):
            fuse(net, SHAPE)
    assert unchanged(net, before)
    assert [step.operation for step in surgeon.history(net)] == ["convert"]


def test_a_bias_beyond_its_dtype_is_named() -> None:
    net = made("acblock", torch.float16)
    with torch.no_grad():
        norm_of(net).running_mean.fill_(-6e4)
        norm_of(net).weight.fill_(8)
    with pytest.raises(PlanError, match="0 cannot be folded: its bias would be beyond 65504"):
        surgeon.fuse_(net, SHAPE)
    with pytest.raises(PlanError, match="its bias would be beyond 65504"):
        net[0].fold()
    wide = surgeon.fuse(net.float(), SHAPE)
    assert wide[0].bias.isfinite().all()


def test_a_number_that_underflows_is_folded() -> None:
    net = made("acblock", torch.float32)
    with torch.no_grad():
        norm_of(net).weight.fill_(1e-44)
    assert surgeon.fuse(net, SHAPE)[0].weight.abs().max() < 1e-43


SPOILT: dict[str, tuple[Callable[[nn.BatchNorm2d], torch.Tensor], float, str]] = {
    "NaN in the mean": (lambda norm: norm.running_mean, float("nan"), "running_mean holds NaN"),
    "NaN in the variance": (lambda norm: norm.running_var, float("nan"), "running_var holds NaN"),
    "an infinite variance": (lambda norm: norm.running_var, float("inf"), "running_var holds infinite numbers"),
    "a negative variance": (lambda norm: norm.running_var, -1.0, "a running variance is negative"),
    "an infinite weight": (lambda norm: norm.weight, float("-inf"), "weight holds infinite numbers"),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("block", FOLDED)
def test_what_is_none_of_numbers_is_not_folded(block: str, what: str) -> None:
    tensor_of, number, message = SPOILT[what]
    net = made(block, torch.float32)
    with torch.no_grad():
        tensor_of(norm_of(net))[3] = number
    before = copied(net)
    with pytest.raises(PlanError, match=f"0 cannot be folded.*{message}. Mend these numbers"):
        surgeon.fuse_(net, SHAPE)
    assert unchanged(net, before)


@pytest.mark.parametrize("block", RECIPES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_none_of_numbers_stays_so_when_it_is_converted(block: str, number: float) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[1, 1, 1, 1] = number
    converted = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [RECIPES[block]]}, SHAPE)
    assert isinstance(converted[0] if block != "octave" else converted.get_submodule("0"), surgeon.Block)
    assert sum(int((~p.isfinite()).sum()) for p in converted.parameters()) == 1


def test_a_negative_variance_stays_so_when_it_is_converted() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    net[1].running_var[3] = -1
    assert surgeon.convert(net, "acnet", SHAPE)[0].square_bn.running_var[3] == -1


def test_a_conversion_beyond_its_dtype_names_the_conv() -> None:
    """The bias of the conv moves into the mean of its norm, which is then too large for float16."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval().half()
    with torch.no_grad():
        net[0].bias.fill_(-6e4)
        net[1].running_mean.fill_(6e4)
    with pytest.raises(PlanError, match=r"0 cannot be swapped: its square_bn\.running_mean would be beyond 65504"):
        surgeon.convert_(net, "acnet", SHAPE)
    assert isinstance(net[0], nn.Conv2d)


def test_the_command_names_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = made("acblock", torch.float16)
    with torch.no_grad():
        norm_of(net).weight.fill_(6e4)
        norm_of(net).running_var.fill_(0)
    surgeon.save(net, tmp_path / "net.pt")
    assert run_surgeon("fuse", tmp_path / "net.pt", "-o", tmp_path / "fused.pt", "-i", "2,8,8,8") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "0 cannot be folded: its weight would be beyond 65504, the largest number of float16. Convert" in said
    assert [*tmp_path.iterdir()] == [tmp_path / "net.pt"]


def test_a_network_that_overflows_in_its_own_dtype_is_folded_by_what_it_does_in_float64() -> None:
    """Numbers between two layers are infinite in float16, and labels tell nothing of it."""

    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.b = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.n(self.a(x))).argmax(1)

    net = Labels().eval()
    with torch.no_grad():
        net.n.weight.copy_(torch.logspace(-2, 4.6, 8))
    net = net.half()
    converted = surgeon.convert(net, "acnet", (1, 3, 32, 32))
    fused = surgeon.fuse(converted)
    assert surgeon.verify(converted, fused, (1, 3, 32, 32)).verdict == "equivalent"
