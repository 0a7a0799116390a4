"""Plans that are chosen by what sites lose: the budget is kept, what hurts stays, and the plan is an ordinary one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.analysis import sites
from surgeon.api import network_for
from surgeon.blocks import registry
from surgeon.errors import PlanError
from surgeon.fitting import budget, data, sensitivity
from surgeon.fitting.budget import Chosen
from surgeon.fitting.space import Space
from surgeon.recipes import recipe as recipes
from surgeon.recipes.recipe import Recipe
from surgeon.surgery import plan as plans

HET = {"rules": [{"swap": "hetconv", "match": {"in_channels": {"min": 8}, "kernel": 3}, "with": {"p": 4}}]}
OCTAVE = {"rules": [{"swap": "octave", "match": {"in_channels": {"min": 8}}, "with": {"alpha": 0.5, "min_size": 2}}]}


class Net(nn.Module):
    """A stem, two residual blocks of one conv each and two convs in a row, on maps of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm_a(self.a(x)))
        x = torch.relu(x + self.b(x))
        x = torch.relu(self.d(torch.relu(self.c(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net().eval()
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    drawn = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(drawn, (8, 8), mode="bilinear")


def _chosen(net: nn.Module, images: Tensor, wanted: dict[str, object], asked: str | None) -> Chosen:
    limit = None if asked is None else budget.parse(asked)
    network = network_for(net, images[:2])
    return budget.choose(network, recipes.from_dict(wanted), data.of(images, batch=12), budget=limit)


@pytest.mark.parametrize("wanted", [HET, OCTAVE], ids=["hetconv", "octave"])
def test_the_budget_is_kept_and_the_plan_can_be_carried_out_and_read_again(
    net: nn.Module, images: Tensor, wanted: dict[str, object], tmp_path: Path
) -> None:
    found = _chosen(net, images, wanted, "macs=0.75")
    macs = found.plan.gained.macs
    assert macs is not None
    assert 0.5 * macs.before < macs.after <= 0.75 * macs.before
    file = tmp_path / "plan.yaml"
    file.write_text(found.plan.dump(), encoding="utf-8")
    again = plans.read(file)
    assert again == found.plan
    converted = surgeon.convert(net, again, images[:2])
    assert sum(isinstance(m, surgeon.Block) for m in converted.modules()) == len(found.plan.swaps)
    note = found.plan.budget
    assert note is not None
    assert note.measured is not None
    measured = [point for point in found.points if point.kind in ("chosen", "uniform", "measured")]
    assert any(point.kind == "uniform" for point in measured)
    best = min(point.error for point in measured)
    assert note.measured == pytest.approx(best, rel=1e-3)  # no uniform way that was measured is nearer


def test_entries_say_what_they_lose_and_those_that_stay_say_for_what(net: nn.Module, images: Tensor) -> None:
    plan = _chosen(net, images, HET, "macs=0.8").plan
    by_path = {entry.path: entry for entry in plan.convs}
    assert by_path["stem"].loses is None
    for path in "abcd":
        losses = by_path[path].loses
        assert losses is not None
        assert list(losses) == ["p: 2", "p: 4", "p: 8"]
        assert losses["p: 2"] < losses["p: 8"]
        if (reason := by_path[path].skip) is not None:
            assert re.fullmatch(r"it would lose [\d.e-]+ of the outputs to save [\d.]+% of the .* \(p: \d\)", reason)
    assert any(by_path[path].skip for path in "abcd")
    assert "loses" in str(plan)
    assert "predicted from single sites" in str(plan)


def test_a_site_that_hurts_stays(images: Tensor) -> None:
    """The norm behind one conv is made to matter a hundred times as much as it does."""
    torch.manual_seed(0)
    net, loud = Net().eval(), Net().eval()
    loud.load_state_dict(net.state_dict())
    with torch.no_grad():
        loud.norm_a.weight.mul_(100)
    swapped = {entry.path for entry in _chosen(net, images, HET, "macs=0.8").plan.swaps}
    assert "a" in swapped
    plan = _chosen(loud, images, HET, "macs=0.8").plan
    assert "a" not in {entry.path for entry in plan.swaps}
    losses = {entry.path: (entry.loses or {}).get("p: 2", 0.0) for entry in plan.convs}
    assert losses["a"] > 2 * losses["b"]


def test_an_error_is_kept_as_measured(net: nn.Module, images: Tensor) -> None:
    losses = [error for entry in _chosen(net, images, HET, None).plan.convs for error in (entry.loses or {}).values()]
    limit = 2 * min(losses)
    plan = _chosen(net, images, HET, f"error={limit:.4f}").plan
    assert plan.swaps
    assert plan.budget is not None
    assert plan.budget.measured is not None
    assert plan.budget.measured <= limit


def test_without_a_budget_the_plan_is_the_recipe_s_own(net: nn.Module, images: Tensor) -> None:
    plan, own = _chosen(net, images, HET, None).plan, surgeon.plan(net, HET, images[:2])
    assert [(entry.path, entry.swap, entry.options) for entry in plan.convs] == [
        (entry.path, entry.swap, entry.options) for entry in own.convs
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("macs=0.1", r"the budget macs=0.1 cannot be reached: macs=0\.\d+ is the least with this recipe"),
        ("error=0.000001", "the budget error=1e-06 cannot be kept"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_what_can(net: nn.Module, images: Tensor, asked: str, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        _chosen(net, images, HET, asked)
    if asked.startswith("macs"):
        least = re.search(r"macs=(0\.\d+) is the least", str(caught.value))
        assert least is not None
        macs = _chosen(net, images, HET, f"macs={least[1]}").plan.gained.macs
        assert macs is not None
        assert macs.after <= float(least[1]) * macs.before


@pytest.mark.parametrize("text", ["", "0.6", "macs", "macs=", "macs=x", "macs=nan", "time=0.5", "macs=1", "error=-1"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        budget.parse(text)
    assert "macs=0.6" in caught.value.todo


def test_a_recipe_without_anything_to_choose_is_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(PlanError, match="leaves no conv whose setting could be chosen"):
        _chosen(net, images, {"rules": [{"swap": "acblock"}]}, "macs=0.8")


def _space(net: nn.Module, wanted: dict[str, object]) -> Space:
    read: Recipe = recipes.from_dict(wanted)
    return Space(read, sites.survey(network_for(net, torch.zeros(1, 3, 8, 8))), seed=0)


@pytest.mark.parametrize("wanted", [HET, OCTAVE], ids=["hetconv", "octave"])
def test_what_is_counted_is_what_the_plan_costs(net: nn.Module, wanted: dict[str, object]) -> None:
    space = _space(net, wanted)
    found = budget.Table(tuple((0.0,) * (len(choice.levels) + 1) for choice in space.choices), tuple(space.parts()))
    none = [0] * len(space.choices)
    trials = [none, *([*none[:i], len(one.levels), *none[i + 1 :]] for i, one in enumerate(space.choices))]
    trials += [[len(choice.levels) // 2 for choice in space.choices], [1] * len(space.choices)]
    costs = [space.plan(levels).gained.macs for levels in trials]
    assert costs[0] is not None
    for levels, cost in zip(trials, costs, strict=True):
        assert cost is not None
        assert cost.after == costs[0].after + found.cost(levels) - found.cost(none)


def test_maps_that_are_added_are_one_choice(net: nn.Module) -> None:
    space = _space(net, OCTAVE)
    assert [choice.paths for choice in space.choices] == [("a", "b"), ("c",)]


def test_levels_between_those_that_are_tried_are_filled_in() -> None:
    assert sensitivity._filled({1: 0.2, 3: 0.8, 5: 3.2}, 6) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    assert sensitivity._filled({0: 0.0, 1: 0.5}, 2) == [0.0, 0.5]
    assert sensitivity._filled({0: 0.5, 2: math.inf}, 3) == [0.5, 0.5, math.inf]
    assert [list(sensitivity.tried_levels(count)) for count in (1, 4, 12)] == [[0], [0, 1, 2, 3], [3, 7, 11]]
    for count in range(1, 20):
        assert len(sensitivity._filled(dict.fromkeys(sensitivity.tried_levels(count), 0.1), count)) == count


def test_settings_keep_what_the_recipe_fixes() -> None:
    for name, given in (("hetconv", {"p": 3, "layout": "best"}), ("octave", {"alpha": 0.3, "min_size": 2})):
        block = registry()[name]
        options = block.Options.model_validate(given)
        settings = block.settings(options)
        assert options in settings
        assert len(settings) > 3
        key = next(iter(given))
        assert [one.model_copy(update={key: given[key]}) for one in settings] == [options] * len(settings)
    plain = registry()["acblock"]
    assert list(plain.settings(plain.Options())) == [plain.Options()]
