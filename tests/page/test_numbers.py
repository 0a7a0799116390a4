"""The drawings of the page show the numbers that were measured: where they lie, and what stands beside them."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from pages import Read
from torch import nn
from torchvision.models import resnet18

import surgeon
from surgeon.figures.kept import KeptEnergy
from surgeon.figures.kernels import KernelFigures, NetworkKernels
from surgeon.figures.magnitudes import AverageMagnitude, BranchMagnitude, LayerMagnitude
from surgeon.figures.spectra import Spectrum
from surgeon.page import charts
from surgeon.page.charts import Axis
from surgeon.page.data import Looked, PageData
from surgeon.page.sections.bench import Bench
from surgeon.page.sections.history import History
from surgeon.page.sections.kernels import Kernels
from surgeon.page.sections.verify import Verify, number
from surgeon.proof.agreement import Agreement, Labelled
from surgeon.proof.report import Bisected, Check, Distance, Guess, Histogram, Report, SiteDistance, TensorDistance
from surgeon.surgery.bench import Setting, Timing
from surgeon.surgery.history import Operation

SITES = (
    SiteDistance("stem", "Conv2d", "Conv2d", 0.0, 0.0, 0.0, False),
    SiteDistance("layer<1>", "ACBlock", "Conv2d", 1e-3, 2e-3, 9.0, True),
    SiteDistance("head", "Conv2d", "Conv2d", None, 5e-3, None, False),
)
HISTOGRAM = Histogram(-6.0, 0.25, (1, 0, 30), equal=7, odd=2)
DISTANCE = Distance("2×3×8×8", 1e-4, 2e-4, 1e-3, 0.5, 74.0, 0.999999, 1.0, HISTOGRAM)
CHECKS = (
    Check("mathematics", 1e-15, 1e-10, True, "replayed", noise=1e-16),
    Check("stored tensors", 64.0, 1.0, False, "not the replay's", "storage", "ulp", 0.5),
    Check("structure", 0.0, 0.0, True, "as built", "storage", "count"),
    Check("rounding", math.nan, math.inf, False, "no limit", "arithmetic"),
)
REPORT = Report("different", "float32", CHECKS, (DISTANCE,), SITES, ("B was edited",))


def _percent(attribute: str) -> float:
    return float(attribute.removesuffix("%")) / 100


def test_a_log_axis_has_equal_steps_for_powers_of_ten_and_zero_at_its_end() -> None:
    axis = Axis(-10, 0, log=True)
    assert [axis.at(10.0**-i) for i in (10, 5, 0)] == pytest.approx([0, 0.5, 1])
    assert [axis.at(one) for one in (0.0, 1e-30, 1e9, math.inf, math.nan)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("most", [0.031, 0.3, 1.0, 1.04, 7.7, 1234.0])
def test_an_axis_from_zero_holds_the_largest_number_and_ends_with_a_tick(most: float) -> None:
    axis = Axis.from_zero([most / 3, most, math.inf])
    places = [place for place, _ in axis.ticks()]
    assert most <= axis.most <= 1.5 * most
    assert places[0] == 0
    assert places[-1] == pytest.approx(1)
    assert 3 <= len(places) <= 10


def test_what_was_found_lies_where_its_number_says() -> None:
    read = Read(str(Verify().body(PageData(title="x", report=REPORT))))
    good = [one for one in read.with_class("fill-good") if "cx" in one]
    # The axis of relative L2 goes from 1e-17 to 10: one power of ten below the least number, one beyond the most.
    assert _percent(good[-1]["cx"]) == pytest.approx((-15 + 17) / (-9 + 17))
    limits = read.with_class("ch-limit")
    assert _percent(next(one for one in limits if "%" in one["x1"])["x1"]) == pytest.approx(
        (-10 + 17) / (-9 + 17), abs=1e-4
    )
    noise = [one for one in read.with_class("ch-noise") if "%" in one["width"]]
    assert _percent(noise[0]["width"]) == pytest.approx(1 / 8)
    assert "Found 1.0e-15, limit 1.0e-10" in read.text


def test_a_failing_check_is_marked_and_a_limit_that_is_not_finite_has_no_line() -> None:
    text = str(Verify().body(PageData(title="x", report=REPORT)))
    read = Read(text)
    assert "1 · Is the mathematics right?" in read.text
    assert read.text.count("✗ fails") == 2
    assert "Found NaN, limit ∞" in read.text
    drawn = [part for part in text.split("<svg ") if "role=" in part and "rounding: fails" in part]
    assert drawn
    assert "ch-limit" not in drawn[0]
    assert "B was edited" in read.text


def test_sites_are_drawn_in_order_and_the_first_that_diverges_is_named() -> None:
    text = str(Verify().body(PageData(title="x", report=REPORT)))
    assert '<strong class="path">layer&lt;1&gt;</strong>' in text
    found = re.findall(r"<title>(stem|layer&lt;1&gt;|head): (isolated|propagated) ([^<]*)</title>", text)
    assert sorted(found) == sorted(
        [
            ("stem", "propagated", "0"),
            ("stem", "isolated", "0"),
            ("layer&lt;1&gt;", "propagated", "2.0e-03"),
            ("layer&lt;1&gt;", "isolated", "1.0e-03, diverges"),
            ("head", "propagated", "5.0e-03"),
        ]
    )
    assert "layer<1>" not in text
    assert "layer<1>" in Read(text).text


def test_where_no_site_differs_that_is_said_and_nothing_is_drawn() -> None:
    report = replace(REPORT, sites=(SITES[0],))
    read = Read(str(Verify().body(PageData(title="x", report=report))))
    assert "no difference at any site" in read.text
    assert "Distance of every site" not in read.text


def test_a_histogram_has_a_column_for_each_count_and_says_what_is_in_none() -> None:
    read = Read(str(Verify().body(PageData(title="x", report=REPORT))))
    columns = [one for one in read.with_class("fill-after") if one.get("height") and "%" in one["width"]]
    assert len(columns) == 2
    assert float(columns[0]["height"]) < float(columns[1]["height"])
    assert "7 are equal, 2 are NaN or infinite" in read.text
    assert "1.0e-06 … 1.8e-06 1" in read.text


def test_tensors_of_a_step_lie_beside_their_limits() -> None:
    tensors = (
        TensorDistance("gradient", "conv.weight", "A", 1e-12, 1e-10),
        TensorDistance("statistic", "bn.running_var", "A", 1e-6, 1e-10),
    )
    report = replace(REPORT, mode="train", tensors=tensors)
    read = Read(str(Verify().body(PageData(title="x", report=report))))
    assert "the gradient of conv.weight: found 1.0e-12, limit 1.0e-10" in read.text
    assert "bn.running_var: found 1.0e-06" in read.text
    limits = [one for one in read.with_class("ch-limit") if one.get("y1") == one.get("y2")]
    assert [float(one["y1"]) for one in limits] == pytest.approx([200 * (1 - (-10 + 13) / (-5 + 13))] * 2)
    assert "1 are beyond their limit" in read.text
    assert "One step of training" not in Read(str(Verify().body(PageData(title="x", report=REPORT)))).text


def test_guesses_bisection_and_agreement_are_told() -> None:
    guesses = (Guess("conv<1>", "bias", "its bias was lost", 1e-9), Guess("", "mode", "it is in train mode", 0.0))
    labelled = Labelled.of(items=100, right_a=90, right_b=85, lost=6, changed_wrong=2)
    data = Agreement(
        *("photos", "none", 100, "images", 100, 10, 92, 99, 0, 0.92, (0.85, 0.96), 0.99, 0.01, 0.5, labelled, ()),
    )
    report = replace(
        REPORT, guesses=guesses, bisected=Bisected(("conv<1>",), 7, "conv<1> alone explains it"), data=data
    )
    text = str(Verify().body(PageData(title="x", report=report)))
    read = Read(text)
    assert "conv<1>" not in text
    for said in ("its bias was lost", "the model itself : it is in train mode", "conv<1> alone explains it"):
        assert said in read.text
    for said in ("92.00%", "90.00%", "85.00%", "6, 1", "0.12", "no part of the verdict"):
        assert said in read.text


def test_numbers_that_are_none_are_written() -> None:
    said = [number(one) for one in (None, math.nan, math.inf, -math.inf, 0.0, 0.25, 3e-9)]
    assert said == ["—", "NaN", "∞", "−∞", "0", "0.25", "3.0e-09"]


def _timing(model: str, ratio: float, low: float, high: float, macs: float | None) -> Timing:
    return Timing(model, "folded", Setting(1, 2), 0.01 * ratio, 0.05, 10**6, macs, ratio, (low, high), None)


def test_times_stand_beside_multiply_adds_with_their_quartiles() -> None:
    timings = (_timing("a", 1.0, 1.0, 1.0, 1.0), _timing("b", 0.8, 0.5, 0.9, 0.4))
    read = Read(str(Bench().body(PageData(title="x", timings=timings))))
    bars = [_percent(one["width"]) for one in read.all("rect") if one.get("width", "").endswith("%")]
    assert bars == pytest.approx([1.0, 1.0, 0.4, 0.8])
    ends = [_percent(one[side]) for one in read.all("line") for side in ("x1", "x2") if one.get("y1") == "95"]
    assert ends == pytest.approx([0.5, 0.9])
    assert "not reliable" in read.text
    assert "0.500 … 0.900" in read.text


def test_a_reliable_time_is_not_doubted() -> None:
    timings = (_timing("a", 1.0, 1.0, 1.0, 1.0), _timing("b", 0.8, 0.79, 0.81, None))
    assert "not reliable" not in Bench().body(PageData(title="x", timings=timings))


def _network(**more: object) -> NetworkKernels:
    matrix = ((0.25, 0.5, 0.25), (0.5, 1.0, 0.5), (0.25, 0.5, 0.0))
    branches = (BranchMagnitude("strip", matrix, 0.5),)
    layer = LayerMagnitude("conv<1>", "acblock", "3→8, 3x3", (3, 3), matrix, matrix, branches)
    return replace(NetworkKernels("(a)", "net", (AverageMagnitude((3, 3), 1, matrix, matrix),), (layer,)), **more)


def test_matrices_are_drawn_with_their_numbers_and_branches_as_strong_as_they_are() -> None:
    text = str(Kernels().body(PageData(title="x", kernels=KernelFigures((_network(),), 0))))
    read = Read(text)
    cells = [float(one["fill-opacity"]) for one in read.with_class("heat")]
    whole = [0.25, 0.5, 0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 0.0]
    halved = [round(one / 2 - 1e-9, 2) for one in whole]
    drawn = [cells[i : i + 9] for i in range(0, len(cells), 9)]
    assert [drawn[0], drawn[1], *drawn[3:]] == [whole] * 4
    assert drawn[2] == pytest.approx(halved, abs=0.011)
    assert "0.25 0.50 0.25 / 0.50 1.00 0.50 / 0.25 0.50 0.00" in read.text
    assert "untrained: weights as they are drawn at first" in read.text
    assert "conv<1>" in read.text


def test_kept_energy_and_spectra_have_their_shares() -> None:
    kept = (KeptEnergy("conv", "hetconv", "best", 0.75, {"best": 0.75, "block": 0.5}),)
    spectra = (Spectrum("conv", "OctaveConv", 8, 4, (8, 8), 0.125, 0.1, (0.25, 0.75, 1.25), (2.0, 1.0, 0.1)),)
    figures = KernelFigures((_network(kept=kept, spectra=spectra, left_out=(("fc", "it is no conv"),)),), 0)
    read = Read(str(Kernels().body(PageData(title="x", kernels=figures))))
    assert "75.0 %" in read.text
    assert "block 50.0 %" in read.text
    assert "75%" in [one.get("width") for one in read.with_class("fill-after")]
    assert "12.5 % beyond" in read.text
    assert "fc : it is no conv" in read.text
    places = [pair.split(",") for pair in read.all("polyline")[0]["points"].split()]
    assert [float(x) for x, _ in places] == pytest.approx([20, 60, 100])
    heights = [float(y) for _, y in places]
    assert heights == sorted(heights)  # downwards on the page: less power at finer frequencies


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    model = surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "acnet", (1, 3, 8, 8))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("weight") and one.dim() == 1:
                one.copy_(torch.linspace(-0.5, 1, 4))
    return model


def test_scales_of_branches_are_those_of_their_norms(block: nn.Module) -> None:
    figures = surgeon.kernels(block)
    read = Read(str(Kernels().body(PageData(title="x", kernels=figures))))
    names = [branch.name for one in figures.networks[0].scales for branch in one.branches]
    assert len(names) == 3
    assert all(name in read.text for name in names)
    assert read.text.count("|γ| 0.5") == 3  # the mean of 0.5, 0, 0.5 and 1
    marks = [float(one["y1"]) - float(one["y2"]) for one in read.with_class("ch-spread")]
    assert marks == pytest.approx([180 * 0.25 / 0.7] * 3, abs=0.01)  # quartiles 0.375 and 0.625, the axis ends at 0.7


def test_a_page_has_the_kernels_of_every_model_that_has_some(block: nn.Module) -> None:
    page = surgeon.report(block, surgeon.fuse(block.eval()), (1, 3, 8, 8), date="a day")
    assert page.data.kernels is not None
    assert [one.label for one in page.data.kernels.networks] == ["(a)", "(b)"]
    assert surgeon.report(nn.Sequential(nn.Conv2d(3, 4, 1)), example=(1, 3, 8, 8)).data.kernels is None


def test_a_history_shows_recipe_plan_versions_hashes_and_measurements() -> None:
    model = surgeon.convert(resnet18(weights=None).eval(), "acnet", (1, 3, 32, 32))
    fused = surgeon.fuse(model)
    steps = surgeon.history(fused)
    read = Read(str(History().body(PageData(title="x", models=(Looked("net.pt", history=steps),)))))
    assert "16 of 20 convs became blocks, as the recipe acnet says." in read.text
    assert "title: ACNet, keeping what the model has learnt" in read.text
    assert [one["title"] for one in read.all("code")] == [h for step in steps for h in (step.parent, step.result)]
    assert steps[0].versions["torch"] in read.text
    assert "blocks folded 16" in read.text
    assert "layer4.1.conv2" in read.text
    assert "trained or edited" not in read.text.split("Converted", 1)[1]


def test_training_between_two_steps_is_said() -> None:
    steps = (Operation("fuse", "a" * 64, "b" * 64), Operation("fuse", "c" * 64, "d" * 64, dtype="bfloat16"))
    read = Read(str(History().body(PageData(title="x", models=(Looked("<b>", history=steps),)))))
    assert read.text.count("trained or edited before this step") == 1
    assert "the weights were cast to bfloat16" in read.text
    assert "<b>" in read.text
    assert not read.all("b")


def test_every_mark_of_a_key_is_drawn() -> None:
    marks = ("circle", "ring", "square", "diamond", "band", "line")
    read = Read(str(charts.key(*[(mark, "good", mark) for mark in marks])))
    assert len(read.all("li")) == len(marks)
    shapes = [tag for tag, _ in read.elements if tag in ("circle", "rect", "line")]
    assert [key for key, _ in itertools.groupby(shapes)] == ["circle", "rect", "line"]
