"""Outputs that are no plain dense floating point tensors: masks, conjugates, sparse layouts, quantised numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.proof.distance import Apart, relative_l2
from surgeon.proof.figures import figures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about quantised and sparse tensors


class Net(nn.Module):
    """A conv, the mean of each channel, and what is made of these scores."""

    def __init__(self, finish: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.finish = nn.Conv2d(3, 4, 3, padding=1), finish

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).mean((2, 3))
        return y, self.finish(y)


KINDS = {
    "masks": lambda y: y > 0,
    "conjugates": lambda y: torch.fft.fft(y).conj(),
    "negatives": lambda y: torch.fft.fft(y).conj().imag,
    "sparse": lambda y: y.to_sparse(),
    "sparse rows": lambda y: y.to_sparse_csr(),
    "sparse conjugates": lambda y: torch.fft.fft(y).to_sparse(),
    "quantised": lambda y: torch.quantize_per_tensor(y.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_is_verified(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(KINDS[kind]).eval()
    x = torch.randn(2, 3, 8, 8)
    converted = surgeon.convert(model, "acnet", x)
    assert surgeon.verify(model, converted, x).equivalent
    with torch.no_grad():
        for parameter in converted.conv.parameters():
            parameter += 0.5
    assert not surgeon.verify(model, converted, x).equivalent


def test_conjugates_are_compared_by_their_numbers() -> None:
    z = torch.tensor([3 + 4j])
    assert relative_l2(z.conj(), torch.tensor([3 - 4j])) == 0
    assert relative_l2(z.conj(), z) == pytest.approx(8 / 5)
    assert Apart.between(z.conj(), z).l2 == pytest.approx(8 / 5)


def test_sparse_numbers_are_compared_with_their_zeros() -> None:
    a = torch.eye(3)
    assert relative_l2(a.to_sparse(), a) == 0
    assert Apart.between(2 * a.to_sparse(), a.to_sparse_csr()).l2 == pytest.approx(1)


def test_masks_have_no_top_1() -> None:
    mask, scores = torch.eye(3) > 0, torch.eye(3)
    assert figures("x", None, (mask, mask)).top1 is None
    assert figures("x", None, (scores, scores)).top1 == 1
