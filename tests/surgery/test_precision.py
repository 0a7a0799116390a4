"""Folded in float64, cast last: `fuse(dtype=…)`, `--half`, `--bf16`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import run_surgeon, shake_
from torch import nn

import surgeon
from surgeon.errors import PlanError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)]
    return shake_(nn.Sequential(*layers), gently=True).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_weight_is_rounded_once_and_the_source_proves_it(dtype: torch.dtype) -> None:
    original = net()
    converted = surgeon.convert(original, "acnet", X)
    fused = surgeon.fuse(converted, X, dtype=dtype, norms=True)
    exact = surgeon.fuse(converted.double(), X, norms=True)
    converted.float()
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name
    last = surgeon.history(fused)[-1]
    assert last.dtype == str(dtype).removeprefix("torch.")
    assert 0.2 < last.measured["ratio"] < 5
    assert 1e-5 < last.measured["noise"] < 0.1
    assert surgeon.verify(converted, fused, X).verdict == "equivalent"
    assert surgeon.verify(original, fused, X).verdict == "equivalent"


def test_a_weight_that_is_rounded_twice_is_found() -> None:
    original = net()
    fused = surgeon.fuse(original, X, dtype=torch.bfloat16, norms=True)
    with torch.no_grad():
        fused[0].weight.copy_(fused[0].weight.float() * 1.01)
    report = surgeon.verify(original, fused, X)
    assert [check.name for check in report.checks if not check.passed] == ["stored tensors"]


def test_the_model_stays_as_it_was_where_a_number_does_not_fit() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = 1e6
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"3 cannot be cast: its weight would be beyond 65504.*--bf16"):
        surgeon.fuse_(model, X, dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_another_dtype_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Take torch\.float16 or torch\.bfloat16"):
        surgeon.fuse(net(), X, dtype=torch.int8)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    fused = surgeon.fuse(model, X, dtype=torch.float16)
    assert fused[2].weight is fused[0].weight


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_a_cast_network_open_and_are_proved(tmp_path: Path, capfd, suffix: str) -> None:  # type: ignore[no-untyped-def]
    model = surgeon.load("surgeon.app.demo.net:SmallResNet")
    surgeon.save(shake_(model, gently=True), tmp_path / "net.pt")
    arch = ["--arch", "surgeon.app.demo.net:SmallResNet"] if suffix == ".safetensors" else []
    given, out = ["--input", "2,1,16,16"], tmp_path / f"half{suffix}"
    assert run_surgeon("convert", tmp_path / "net.pt", "--recipe", "acnet", "-o", tmp_path / "acnet.pt", *given) == 0
    assert run_surgeon("fuse", tmp_path / "acnet.pt", "--half", "-o", out, *arch, *given) == 0
    capfd.readouterr()
    assert run_surgeon("verify", tmp_path / "net.pt", out, *arch, *given) == 0
    assert "float16" in capfd.readouterr().out
