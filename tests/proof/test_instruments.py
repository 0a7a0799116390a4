"""What a report says beside its sentences, for those who draw it: questions, units, noise, and histograms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import surgeon
from surgeon.proof.figures import histogram
from surgeon.proof.report import Check, Histogram, Report


@pytest.fixture(scope="module")
def reports() -> tuple[Report, Report]:
    """A right fold of a small network in float32, and one with a fault of 1e-3."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    converted = surgeon.convert(model, "acnet", (1, 3, 8, 8))
    fused = surgeon.fuse(converted)
    right = surgeon.verify(converted, fused, (2, 3, 8, 8))
    with torch.no_grad():
        next(m for m in fused.modules() if isinstance(m, nn.Conv2d)).weight[0, 0, 1, 1] += 1e-3
    return right, surgeon.verify(converted, fused, (2, 3, 8, 8))


def _check(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_every_check_says_which_question_it_answers_and_in_which_unit(reports: tuple[Report, Report]) -> None:
    right, wrong = reports
    assert right.equivalent
    assert not wrong.equivalent
    assert {check.asks for check in right.checks} == {"mathematics", "storage", "arithmetic"}
    assert (_check(right, "stored tensors").unit, _check(right, "stored tensors").noise) == ("ulp", 0.5)
    assert _check(right, "structure").unit == "count"


def test_rounding_lies_between_its_noise_and_its_limit(reports: tuple[Report, Report]) -> None:
    check = _check(reports[0], "rounding")
    assert check.noise is not None
    assert check.noise * 2 == pytest.approx(check.limit)  # the margin of float32
    assert check.measured <= check.limit


def test_histogram_counts_what_a_loop_counts() -> None:
    torch.manual_seed(1)
    a = torch.randn(50, 7, dtype=torch.float64)
    b = a + 10.0 ** (torch.rand(50, 7) * 8 - 8)
    b[0, :4], b[1, 0], a[1, 1], b[1, 1] = a[0, :4], math.nan, math.inf, math.inf
    found = histogram([(b, a)])
    by_hand: dict[int, int] = {}
    for one, other in zip(b.flatten().tolist(), a.flatten().tolist(), strict=True):
        if one != other and not math.isnan(one):
            bin_ = math.floor(math.log10(abs(one - other)) / 0.25)
            by_hand[bin_] = by_hand.get(bin_, 0) + 1
    first = round(found.lowest / found.width)
    assert {first + i: count for i, count in enumerate(found.counts) if count} == by_hand
    assert (found.equal, found.odd) == (5, 1)
    assert sum(found.counts) == 350 - 6


def test_outputs_are_counted_together_and_equal_ones_have_no_bins() -> None:
    one = torch.ones(3)
    assert histogram([(one, one), (one > 0, one > 0)]) == Histogram(0.0, 0.25, (), 6, 0)


def test_report_carries_the_histogram_to_json(reports: tuple[Report, Report]) -> None:
    right, wrong = (report.to_dict()["distances"][0]["histogram"] for report in reports)
    assert sum(right["counts"]) + right["equal"] == 20
    top = [d["lowest"] + d["width"] * len(d["counts"]) for d in (right, wrong)]
    assert top[1] > top[0]  # the fault moves the outputs further than rounding does
