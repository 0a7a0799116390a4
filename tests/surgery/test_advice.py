"""What each bundled recipe would do to a network: its rows are plans, and a recipe that fails is a row too."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.analysis import sites
from surgeon.recipes import recipe as recipes
from surgeon.surgery import advice

SHAPE = (1, 3, 32, 32)


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in in (3, 16, 16, 16):
        layers += [nn.Conv2d(c_in, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def test_every_bundled_recipe_has_a_row_that_says_what_its_plan_says() -> None:
    net, rows = _net(), {}
    for row in surgeon.recipes_for(net, SHAPE).offers:
        rows[row.recipe] = row
    assert list(rows) == list(recipes.bundled())
    for name in ("acnet", "hetconv-p4", "octave"):
        plan = surgeon.plan(net, name, SHAPE)
        assert (rows[name].swapped, rows[name].gained) == (len(plan.swaps), plan.gained)
        assert rows[name].training == plan.total.macs
        assert rows[name].keeps_function == plan.keeps_function
    assert rows["octave"].why == "at most 4 input channels"
    assert rows["octave"].stay == 1


def test_it_says_what_to_take_for_what() -> None:
    found = surgeon.recipes_for(_net(), SHAPE)
    assert found.free is not None
    assert found.free.recipe == "acnet"
    assert found.saves_most is not None
    assert found.saves_most.saves == min(row.saves for row in found.offers)
    *_, free, most, time = str(found).splitlines()
    assert free.startswith("for training further, at no cost once it is fused: acnet; ×1.6")
    assert most.startswith(f"for a cheaper network: {found.saves_most.recipe} saves most, MACs ×0.")
    assert (
        time == f"fewer MACs need not be faster; surgeon plan MODEL -r {found.saves_most.recipe} --time measures that"
    )


def test_acnet_is_free_only_where_it_keeps_the_function() -> None:
    rows = {row.recipe: row for row in surgeon.recipes_for(_net(), SHAPE).offers}
    assert (rows["acnet"].is_free, rows["acnet-scratch"].is_free, rows["octave"].is_free) == (True, False, False)
    assert (rows["acnet"].exact, rows["acnet-scratch"].exact) == (4, 0)
    without_norms = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    row = next(row for row in surgeon.recipes_for(without_norms, SHAPE).offers if row.recipe == "acnet")
    assert (row.keeps_function, row.swapped, row.exact) == (True, 1, 0)
    assert "in eval mode" in str(surgeon.recipes_for(without_norms, SHAPE))


def test_of_free_recipes_the_one_that_is_exact_in_training_is_taken() -> None:
    net = nn.ModuleDict()
    net["backbone"] = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net["head"] = nn.Conv2d(8, 8, 3)
    whole = nn.Sequential()
    for name, part in net.items():
        whole.add_module(name, part)
    found = surgeon.recipes_for(whole.eval(), SHAPE)
    assert found.free is not None
    assert (found.free.recipe, found.free.swapped, found.free.exact) == ("acnet-online", 2, 2)
    assert "yes; 1 in eval mode only" in str(found)
    branches = replace(found, offers=tuple(row for row in found.offers if row.recipe != "acnet-online")).free
    assert branches is not None
    assert (branches.recipe, branches.swapped, branches.exact) == ("acnet-backbone", 1, 1)


def test_nothing_to_take_where_nothing_is_gained() -> None:
    found = surgeon.recipes_for(nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU()), (1, 16, 8, 8))
    assert (found.free, found.saves_most) == (None, None)
    assert str(found).splitlines()[-1] == "no bundled recipe saves 5 % of the multiply-adds of this network"


def test_a_recipe_that_cannot_be_planned_is_a_row_that_says_why() -> None:
    rules = {"surgeon": 1, "title": "none", "rules": [{"swap": "acblock", "match": {"name": "nowhere"}}]}
    surveyed = surgeon.survey(_net(), SHAPE)
    wrong, right = advice.advise(surveyed, [recipes.from_dict(rules), recipes.load("acnet")]).offers
    assert wrong.error == "there is no conv of the kind that it is for"
    assert (wrong.swapped, right.swapped, right.error) == (0, 4, None)


def test_the_main_reason_is_one_of_convs_that_the_recipe_would_swap() -> None:
    net = nn.Sequential(*[nn.Conv2d(6, 6, 1) for _ in range(3)], nn.Conv2d(6, 6, 3))
    (row,) = advice.advise(surgeon.survey(net, (1, 6, 8, 8)), [recipes.load("hetconv-p4")]).offers
    assert row.why is not None
    assert row.why.startswith("6 input and 6 output channels cannot be cut into 4 parts")
    assert row.stay == 1


def test_reasons_that_differ_in_names_and_numbers_are_one() -> None:
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 10, 3), nn.Conv2d(10, 10, 3, groups=5))
    (row,) = advice.advise(surgeon.survey(net, (1, 6, 16, 16)), [recipes.load("hetconv-p4")]).offers
    assert (row.stay, row.swapped) == (3, 0)
    assert row.why is not None
    assert row.why.startswith("6 input and 4 output channels")


def test_an_error_of_one_recipe_is_its_row() -> None:
    sized = {"surgeon": 1, "title": "sized", "rules": [{"swap": "acblock", "match": {"size": {"min": 8}}}]}
    (row,) = advice.advise(surgeon.survey(tiny.Picky()), [recipes.from_dict(sized)]).offers
    assert row.error is not None
    assert "asks for the size of feature maps, but no input is known" in row.error


def test_the_network_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    survey = sites.survey
    monkeypatch.setattr(sites, "survey", lambda network: (looks.append(network), survey(network))[1])
    surgeon.recipes_for(_net(), SHAPE)
    assert len(looks) == 1


def test_a_guessed_input_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "surgeon"):
        surgeon.recipes_for(_net())
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("no --input was given; `min_size` of octave and all costs are for 1×3×")


def test_without_an_input_counts_of_parameters_are_left() -> None:
    found = surgeon.recipes_for(tiny.Picky())
    assert "no input is known, so multiply-adds are not counted" in str(found)
    assert found.saves_most is None


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(_net(), "net.pt")
    return tmp_path


def test_the_command_prints_the_table_and_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("recipes", "--for", "net.pt", "-i", "1,3,32,32") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 convs, ")
    assert "for a cheaper network: " in printed
    assert run_surgeon("recipes", "--for", "net.pt", "-i", "1,3,32,32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["free"] == "acnet"
    assert [row["recipe"] for row in found["recipes"]] == list(recipes.bundled())
    octave = next(row for row in found["recipes"] if row["recipe"] == "octave")
    assert octave["macs"]["after"] < octave["macs"]["before"] == found["macs"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-i", "1,3,8,8"), "name it with --for"),
        (("--allow", "mypackage"), "name it with --for"),
        (("acnet", "--for", "net.pt"), "plans all bundled recipes"),
        (("--schema", "--for", "net.pt"), "plans all bundled recipes"),
        (("--for", "nte.pt"), "nte.pt"),
        (("--for", "net.pt", "-i", "1,3,8,8", "-i", "1,3,9,9"), "--input is given twice"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert run_surgeon("recipes", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
