"""Two classifiers on the same images: counts as numpy counts them, a test by hand, and the same in two processes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import _in_processes
from torch import Tensor, nn

import surgeon
from surgeon.errors import VerifyError
from surgeon.fitting import data as sources
from surgeon.fitting.on_data import measured
from surgeon.fitting.processes import ALONE, Processes
from surgeon.proof.agreement import Agreement, Labelled, difference, mcnemar, wilson


def _nets(classes: int = 8) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes))
    b = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes))
    b.load_state_dict({key: value + 0.03 * torch.randn_like(value) for key, value in a.state_dict().items()})
    return a.eval(), b.eval()


def _photos(count: int = 90) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _labels(count: int = 90, classes: int = 8) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(2))


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_the_counts_are_those_of_numpy() -> None:
    a, b = _nets()
    photos = _photos()
    with torch.no_grad():
        scores = [net(photos).double().numpy() for net in (a, b)]
        labels = np.where(np.arange(90) % 3 > 0, scores[0].argmax(1), _labels().numpy())
    found = surgeon.agreement(a, b, photos, labels=labels, batch=16)
    best_a, best_b = (one.argmax(1) for one in scores)
    five = np.argsort(-scores[1], 1)[:, :5]
    p, q = map(_softmax, scores)
    kl = (p * np.log(p / q)).sum(1)
    assert 0 < found.agreeing < found.items == found.images == 90
    assert found.agreeing == (best_a == best_b).sum()
    assert found.in_five == (five == best_a[:, None]).any(1).sum()
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-5)
    assert [one.name for one in found.worst] == [f"image {i}" for i in np.argsort(-kl)[:5]]
    assert found.labelled is not None
    right_a, right_b = best_a == labels, best_b == labels
    assert (found.labelled.right_a, found.labelled.right_b) == (right_a.sum(), right_b.sum())
    assert found.labelled.lost == (right_a & ~right_b).sum() > 0
    assert found.labelled.won == (~right_a & right_b).sum()
    assert found.labelled.changed_wrong == (~right_a & ~right_b & (best_a != best_b)).sum()
    assert found.labelled.p == _by_hand(found.labelled.lost, found.labelled.won)


def _by_hand(lost: int, won: int) -> float:
    """Add up, over all ways in which coins may fall, those that split as unevenly or more."""
    n = lost + won
    if n > 12:
        ways = [Fraction(math.comb(n, k)) for k in range(n + 1)]
        return float(sum(way for k, way in enumerate(ways) if abs(2 * k - n) >= abs(won - lost)) / 2**n)
    falls = [sum(coins) for coins in product((0, 1), repeat=n)]
    return sum(abs(2 * heads - n) >= abs(won - lost) for heads in falls) / len(falls)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (1, 0), (3, 3), (2, 7), (7, 2), (0, 12), (5, 30), (40, 41)])
def test_the_paired_test_is_the_exact_binomial(lost: int, won: int) -> None:
    assert mcnemar(lost, won) == pytest.approx(_by_hand(lost, won), rel=1e-12)


def test_the_paired_test_of_many_images_is_neither_slow_nor_zero_by_underflow() -> None:
    assert 0 < mcnemar(4_800, 5_200) < 1e-4
    assert mcnemar(5_000, 5_000) == 1.0


def test_what_the_test_says_follows_its_p() -> None:
    assert "may be chance" in Labelled.of(100, 90, 85, 6, 2).says
    assert "A is better" in Labelled.of(100, 90, 75, 16, 2).says
    assert "B is better" in Labelled.of(100, 75, 90, 1, 2).says
    assert Labelled.of(100, 90, 90, 0, 2).says == "both are right on the same images"


def test_intervals_hold_what_they_are_of_and_turn_with_the_sides() -> None:
    for lost, won in ((0, 0), (6, 1), (30, 2), (0, 50)):
        low, high = difference(lost, won, 100)
        assert -1 <= low < (won - lost) / 100 < high <= 1 or (lost, won) == (0, 50)
        assert difference(won, lost, 100) == pytest.approx((-high, -low))
    assert wilson(0, 50)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(50, 50)[1] == pytest.approx(1)


def test_scores_that_are_shares_already_are_not_taken_through_softmax_again() -> None:
    a, b = _nets()
    photos = _photos(20)
    plain = surgeon.agreement(a, b, photos)
    shares = surgeon.agreement(nn.Sequential(a, nn.Softmax(1)), nn.Sequential(b, nn.Softmax(1)), photos)
    assert shares.kl_mean == pytest.approx(plain.kl_mean, rel=1e-4)
    assert shares.agreeing == plain.agreeing


class _Segments(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 7, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x)}


def test_maps_are_compared_pixel_by_pixel() -> None:
    a, b = _Segments(0), _Segments(1)
    photos = _photos(6)
    found = surgeon.agreement(a, b, photos, batch=4)
    with torch.no_grad():
        same = a(photos)["out"].argmax(1) == b(photos)["out"].argmax(1)
    assert (found.of, found.items, found.images) == ("pixels", 6 * 64, 6)
    assert found.agreeing == int(same.sum())
    assert found.interval is None
    assert sorted(one.differing for one in found.worst)[-1] <= 64
    with pytest.raises(VerifyError, match="images have one label each"):
        surgeon.agreement(a, b, photos, labels=[0] * 6)


def test_outputs_that_are_no_scores_are_refused() -> None:
    net = nn.Conv2d(3, 3, 3)
    with pytest.raises(VerifyError, match="the outputs are no scores of classes"):
        surgeon.agreement(net, net, _photos(4))
    with pytest.raises(VerifyError, match="output 0 is"):
        surgeon.agreement(_nets(8)[0], _nets(9)[0], _photos(4))


class _Odd(nn.Module):
    """Gives NaN for the first image of a batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return torch.cat([out[:1] * math.nan, out[1:]])


def test_a_score_that_is_nan_agrees_with_nothing_and_is_named_first() -> None:
    a, _ = _nets()
    found = surgeon.agreement(a, _Odd(a), _photos(10), batch=5)
    assert (found.odd, found.agreeing, found.kl_mean, found.kl_max) == (2, 8, 0.0, 0.0)
    assert [one.kl for one in found.worst] == [None, None]
    assert surgeon.agreement(_Odd(a), _Odd(a), _photos(1)).kl_mean is None


def _counted(processes: Processes, batch: int) -> dict[str, object]:
    a, b = _nets()
    data = sources.of(_photos(), batch=batch, labels=_labels())
    return measured(a, b, data, processes=processes).to_dict()


def test_two_processes_count_the_very_numbers_of_one_alone(tmp_path: Path) -> None:
    alone = _counted(ALONE, 16)
    for i, count in enumerate((2, 4)):
        found = _in_processes(_counted, 16 if count == 2 else 40, count, tmp_path / str(i))
        assert found == [alone if count == 2 else _counted(ALONE, 40)] * count


def test_the_table_says_it_all() -> None:
    a, b = _nets()
    shown = str(surgeon.agreement(a, b, _photos(), labels=_labels()))
    for said in (
        "agreement: the same class in",
        "KL(A‖B) over 8 classes",
        "paired test:",
        "changed predictions:",
        "image",
    ):
        assert said in shown
    assert isinstance(surgeon.agreement(a, a, _photos(4)), Agreement)
