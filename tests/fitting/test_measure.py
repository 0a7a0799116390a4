"""What a converted network is worth: agreement, distance, accuracy, as sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.fitting import data as images
from surgeon.fitting.measure import Worth, measure, totals


class Scores(nn.Module):
    """Gives the first numbers of an image as the scores of classes."""

    def __init__(self, factor: float = 1.0, classes: int = 3) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.flatten(1)[:, : self.classes]


def _images(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[:, None, None, :]


X = _images([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [1.0, 2.0, 4.0], [2.0, 1.0, 0.0]])
Y = torch.tensor([0, 1, 2, 2])


def test_figures_are_those_of_a_count_by_hand() -> None:
    found = measure(Scores(-1.0), Scores(), images.of((X, Y), labels="own", batch=3))
    assert found == Worth(4, 4, 0, 4, 1, 3, found.apart, found.size)
    assert found.relative_l2 == pytest.approx(2.0, rel=1e-12)
    assert found.agreement == 0
    assert found.accuracy == 0.25
    assert found.accuracy_before == 0.75


def test_without_labels_there_is_no_accuracy() -> None:
    found = measure(Scores(2.0), Scores(), images.of(X))
    assert (found.agreement, found.accuracy, found.accuracy_before) == (1.0, None, None)
    assert found.relative_l2 == pytest.approx(1.0)


def test_sums_of_shares_are_the_sums_of_the_whole() -> None:
    data = images.of((X, Y), labels="own", batch=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    parts = [measure(model, Scores(), data.share(rank, 3)) for rank in range(3)]
    whole = measure(model, Scores(), data)
    assert totals(sum(parts, Worth())) == pytest.approx(totals(whole), rel=1e-12)
    assert Worth(*totals(whole)) == whole


def test_modes_and_hooks_are_left_alone_and_dropout_is_off() -> None:
    model = nn.Sequential(Scores(), nn.Dropout(0.9)).train()
    assert measure(model, Scores(), images.of(X)).relative_l2 == 0
    assert model.training
    assert model[1].training


def test_every_pixel_of_a_segmentation_is_counted_and_pictures_are_no_classes() -> None:
    maps = images.of(torch.rand(2, 3, 4, 5))
    dense = nn.Conv2d(3, 7, 1)
    found = measure(dense, dense, maps)
    assert (found.scored, found.agreement) == (2 * 4 * 5, 1.0)
    picture = nn.Conv2d(3, 3, 1)
    assert measure(picture, picture, maps).agreement is None


class InDict(nn.Module):
    """A head that gives its scores among other outputs."""

    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean((1, 2, 3)), "out": self.scores(x), "index": torch.arange(len(x))}


def test_scores_are_found_among_other_outputs() -> None:
    found = measure(InDict(Scores(-1.0)), InDict(Scores()), images.of(X))
    assert found.agreement == 0
    assert found.size == pytest.approx(float(X.square().sum() + X.mean((1, 2, 3)).square().sum()))


class Detector(nn.Module):
    """Finds as many boxes as there are numbers above a threshold."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": image[image > self.least], "labels": image[image > self.least].long()} for image in x]


def test_detectors_that_find_other_numbers_of_boxes_have_no_distance() -> None:
    found = measure(Detector(0.5), Detector(2.5), images.of(X))
    assert (found.images, found.uncompared, found.relative_l2, found.agreement) == (4, 4, None, None)
    assert measure(Detector(0.5), Detector(0.5), images.of(X)).relative_l2 == 0


def test_nan_agrees_with_nothing_and_is_infinitely_far() -> None:
    found = measure(Scores(math.nan), Scores(math.nan), images.of(X))
    assert found.agreement == 0
    assert found.relative_l2 == math.inf


def test_other_classes_are_refused() -> None:
    with pytest.raises(VerifyError, match="Compare models with the same"):
        measure(Scores(classes=2), Scores(), images.of(X))
