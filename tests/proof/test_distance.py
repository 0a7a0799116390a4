"""Float64 without a float64 copy of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgeon.models.copies import shadow
from surgeon.proof.distance import as_double, widened

X = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Large(nn.Module):
    """Its large parameters are 1.2 and 3.5 MB; one of its convs is called twice, once inside a module that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(4, 256, 3, padding=1), nn.Conv2d(256, 128, 3, padding=1)
        self.tail = nn.Sequential(nn.BatchNorm2d(128), nn.Conv2d(128, 256, (3, 9)), self.conv)
        self.register_buffer("table", torch.randn(1, 128, 64, 64))  # 2.1 MB

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x).relu()) + self.table[..., :12, :12]
        return self.tail(y) * self.table[..., :10, :4]


class ReadsItsLargeWeight(Large):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linalg.vector_norm(self.conv.weight)


def _net(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("kind", [Large, ReadsItsLargeWeight])
def test_it_computes_what_a_copy_in_float64_does_bit_for_bit(kind: type[nn.Module]) -> None:
    net = _net(kind)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with torch.no_grad():
        expected, out = shadow(net, as_double)(X), widened(net)(X)
        assert out.dtype == torch.float64
        if kind is Large:
            assert torch.equal(out, expected)
        else:  # the weight that is read directly is as it is stored, and so is the norm of it
            assert torch.allclose(out, expected, rtol=1e-4)
        assert net(X.float()).dtype == torch.float32
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_large_parameters_are_shared_and_in_float64_only_while_they_are_used() -> None:
    net = _net(Large)
    copy = widened(net)
    seen = []
    copy.conv.register_forward_hook(lambda module, args, out: seen.append(module.weight.dtype), prepend=True)
    for _ in range(2):
        with torch.no_grad():
            copy(X)
        assert copy.conv.weight.data_ptr() == net.conv.weight.data_ptr()
        assert copy.stem.weight.dtype == copy.table.dtype == torch.float64
    assert seen == [torch.float64] * 4


def test_after_an_error_they_are_as_they_were() -> None:
    net = _net(Large)
    copy = widened(net)
    with pytest.raises(RuntimeError), torch.no_grad():
        copy.conv(X)
    assert copy.conv.weight.dtype == torch.float32
