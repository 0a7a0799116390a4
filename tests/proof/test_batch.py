"""The first images of a batch are judged in float64, and speak for the others only where those are as near."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.models.call import Inputs
from surgeon.proof import batch
from surgeon.proof.held import Held


class _OfImage(nn.Module):
    """A conv whose result is scaled in the images from one on."""

    def __init__(self, first: int, factor: float) -> None:
        super().__init__()
        self.first, self.factor = first, factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[: self.first], x[self.first :] * self.factor]) if len(x) > self.first else x


class _Mean(nn.Module):
    """Adds to every image the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


def _net(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    unit = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)]
    return nn.Sequential(*unit, *more).eval()


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List how many images every pass in float64 has, from now on."""
    found: list[int] = []
    call = Held.call

    def counting(self: Held, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> object:
        found.append(inputs.batch if dtype == torch.float64 and inputs.shapes[0][2:] == (12, 12) else 0)
        return call(self, model, inputs, dtype)

    monkeypatch.setattr(Held, "call", counting)
    return found


@pytest.mark.parametrize("with_history", [True, False])
def test_one_image_of_a_batch_is_run_in_float64(with_history: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a = surgeon.convert(_net(), "acnet", (4, 3, 12, 12))
    b = surgeon.fuse(a)
    if not with_history:
        a, b = _net(), copy.deepcopy(_net())
    images = _counted(monkeypatch)
    report = surgeon.verify(a, b, torch.randn(4, 3, 12, 12))
    assert report.equivalent
    assert images.count(1) >= 2
    assert images.count(4) == (0 if with_history else 2)  # A and B, on numbers that are not negative
    assert report.distances[0].input == "4×3×12×12"


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("factor", [1.001, -1.0, float("nan")])
def test_a_fault_that_only_later_images_show_is_found(first: int, factor: float) -> None:
    a, b = _net(_OfImage(first, 1.0)), _net(_OfImage(first, factor))
    assert surgeon.verify(a, b, torch.randn(4, 3, 12, 12)).verdict == "different"


def test_where_the_images_of_a_batch_are_mixed_nothing_right_is_condemned_and_a_fault_is_found() -> None:
    a, b = _net(_Mean()), _net(_Mean())
    assert surgeon.verify(a, b, torch.randn(4, 3, 12, 12)).equivalent
    assert surgeon.verify(a, _net(), torch.randn(4, 3, 12, 12)).verdict == "different"


def test_a_result_that_is_no_row_of_images_is_not_cut() -> None:
    whole, part = torch.randn(4, 5), torch.randn(1, 5)
    assert torch.equal(batch.rows([whole], [part], 1, 2, 4)[0], whole[1:2])
    for out, one in [(whole.t(), part.t()), (whole, torch.randn(5)), (torch.tensor(1.0), torch.tensor(1.0))]:
        assert batch.rows(out, one, 0, 1, 4) is None
    assert batch.rows({"loss": 1.0}, {"loss": 1.0}, 0, 1, 4) is None
    assert batch.rows([whole], (part,), 0, 1, 4) is None


def test_few_numbers_need_more_images_and_too_many_the_whole_batch() -> None:
    inputs = Inputs((torch.randn(8, 3, 4, 4),))
    assert batch.further(inputs, torch.zeros(1, 64), 64) == []
    assert [one.batch for one in batch.further(inputs, torch.zeros(1, 20), 64) or []] == [3]
    assert batch.further(inputs, torch.zeros(1, 10), 64) is None
    assert batch.first_of(Inputs((torch.randn(1, 3, 4, 4),))) is None


def test_labels_of_other_images_are_compared() -> None:
    labels = torch.tensor([[1, 2], [3, 4], [5, 6]])
    other = labels.clone()
    other[2, 1] = 7
    assert batch.speaks_for(labels, labels, 1)
    assert not batch.speaks_for(other, labels, 1)


def test_an_image_further_apart_than_those_judged_is_not_spoken_for() -> None:
    a = torch.randn(3, 100, dtype=torch.float64)
    b = a * (1 + 1e-6)
    assert batch.speaks_for(b, a, 1)
    b[2] = a[2] * (1 + 4e-6)
    assert not batch.speaks_for(b, a, 1)
