"""Private names of torch: what surgeon does with them, and without those that it can do without."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from surgeon import _torch_compat as compat
from surgeon.models.cost import measure


def test_common_classes_are_those_of_torch() -> None:
    assert issubclass(nn.BatchNorm2d, compat.BatchNorm)
    assert issubclass(nn.SyncBatchNorm, compat.BatchNorm)
    assert issubclass(nn.InstanceNorm2d, compat.NormBase)
    assert not issubclass(nn.InstanceNorm2d, compat.BatchNorm)
    assert all(issubclass(kind, compat.ConvNd) for kind in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d))
    assert not issubclass(nn.Linear, compat.ConvNd)
    assert isinstance(torch.ops.aten.relu.default, compat.OpOverload)


def test_a_checkpoint_shows_while_it_runs() -> None:
    seen: list[object] = [compat.saved_tensor_hooks()]

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.saved_tensor_hooks())
        return x * 2

    checkpoint.checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert seen[0] is None
    assert seen[1] is not None


def test_a_conv_that_computes_differently_is_known() -> None:
    class Own(nn.Conv2d):
        def _conv_forward(self, *args: torch.Tensor) -> torch.Tensor:
            return super()._conv_forward(*args) * 2

    class Mine(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    assert compat.own_parts_of_a_conv(Own) == ["_conv_forward"]
    assert compat.own_parts_of_a_conv(Mine) == ["forward"]
    assert compat.own_parts_of_a_conv(nn.Conv2d) == []


def test_operators_that_write_nothing_anew_are_known() -> None:
    aten = torch.ops.aten
    assert compat.makes_new_tensors(aten.relu.default)
    assert not compat.makes_new_tensors(aten.relu_.default)
    assert not compat.makes_new_tensors(aten.view.default)
    assert compat.makes_new_tensors(len)
    assert compat.packet_of(aten.relu.default) is aten.relu
    assert compat.packet_of(len) is None


def test_costs_are_those_of_torchs_own_counter() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
    net.append(nn.Linear(8 * 12 * 12, 5))
    x = torch.zeros(2, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net(x)
    assert measure(net, [x]).macs == flops.get_total_flops() // 2 > 0


def test_without_names_that_can_be_missed_a_network_still_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    monkeypatch.delattr(torch._dynamo.config, "recompile_limit", raising=False)
    assert compat.saved_tensor_hooks() is None
    with compat.has_recompile_limit(7):
        pass
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    converted = surgeon.convert(net, "acnet", (1, 3, 8, 8))
    assert surgeon.verify(net, converted, (1, 3, 8, 8)).equivalent


def test_a_file_that_cannot_be_examined_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "PyTorchFileReader")
    with pytest.raises(NotImplementedError, match="does not let a file be examined"):
        compat.pickle_program(io.BytesIO())
