"""What a user reads on the way: counts, advice that fits where it is given, and summaries that are whole."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import Tensor, nn

import surgeon
from surgeon.display import report as reports
from surgeon.errors import ModelError, PlanError, RecipeError, SurgeonError
from surgeon.proof.report import SiteDistance


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(_net(), tmp_path / "net.pt")
    return tmp_path


def _sites(count: int, *, diverging: int = 0) -> list[SiteDistance]:
    return [
        SiteDistance(
            path=f"c{i}", kind_a="A", kind_b="B", isolated=0.0, propagated=0.0, ulps=0.0, diverges=i < diverging
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        (_sites(16), "these are 12 of 16 changed sites; --json lists all 20 sites"),
        (_sites(16, diverging=14), "these are 12 of 14 sites that diverge; --json lists all 20 sites"),
        (_sites(16, diverging=2), "these are the sites that diverge; --json lists all 20 sites"),
        (_sites(16, diverging=1), "this is the only site that diverges; --json lists all 20 sites"),
        (_sites(3), ""),
    ],
)
def test_a_table_says_what_it_leaves_out(sites: list[SiteDistance], says: str) -> None:
    assert reports._sites(sites, 20).caption == says


def test_one_is_not_many(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ("--recipe", "acnet", "--set", 'rules[0].match.name="0"', "-i", "1,3,16,16")
    assert run_surgeon("convert", "net.pt", *one, "-o", "one.pt") == 0
    assert "self-check: 1 swapped conv against" in capsys.readouterr().out
    assert run_surgeon("fuse", "one.pt") == 0
    assert "folded: 1 block, " in capsys.readouterr().out
    assert run_surgeon("plan", "net.pt", "--recipe", "acnet", "--set", "rules[7].optional=true") == 2
    assert "rules has 1 entry, counted from 0" in capsys.readouterr().err


def test_a_plan_says_where_it_was_written_as_convert_does(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "net.pt", "--recipe", "acnet", "-i", "1,3,16,16", "-o", "plan.yaml", "--force")
    assert run_surgeon(*arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\nwritten: plan.yaml\n")
    assert "written" not in printed.err
    assert run_surgeon(*arguments, "--json") == 0
    printed = capsys.readouterr()
    assert "written: plan.yaml" not in printed.out
    assert "note: written: plan.yaml" in printed.err


def test_what_an_edited_plan_costs_is_printed_anew(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ("--recipe", "acnet", "--set", 'rules[0].match.name="0"', "-i", "1,3,16,16")
    assert run_surgeon("plan", "net.pt", *one, "-o", "plan.yaml") == 0
    plan = saved / "plan.yaml"
    plan.write_text(plan.read_text("utf-8").replace("  skip: no rule claims it", "  swap: acblock"), "utf-8")
    assert run_surgeon("plan", "net.pt", "--recipe", "acnet", "-i", "1,3,16,16") == 0
    *_, wanted, gained = capsys.readouterr().out.splitlines()
    assert wanted.startswith("2 of 2 convs swapped")
    assert run_surgeon("convert", "net.pt", "--plan", "plan.yaml") == 0
    printed = capsys.readouterr().out
    assert {wanted, gained} <= {*printed.splitlines()}
    assert "without more options" not in printed


def test_no_summary_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_surgeon("--help") == 0
    (commands,) = re.findall(r"Commands:\n(.*?)\n\n", capsys.readouterr().out, re.DOTALL)
    assert len(commands.splitlines()) == 12
    assert "..." not in commands


def test_python_code_is_given_with_the_name_of_its_class(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("single.py").write_text("class Head: ...\nclass Tail: ...\n")
    assert run_surgeon("survey", "single.py") == 2
    assert "Name the class, or a function that returns the network: single.py:Head or single.py:Tail" in (
        capsys.readouterr().err
    )
    Path("broken.py").write_text("class")
    assert run_surgeon("survey", "broken.py") == 2
    assert "broken.py:Net" in capsys.readouterr().err


def test_only_a_name_that_is_near_is_suggested(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for missing, is_near in (("nosuch.pt", False), ("nett.pt", True)):
        assert run_surgeon("survey", missing) == 2
        assert ("Did you mean net.pt" in capsys.readouterr().err) == is_near


class _Waits(nn.Module):
    """Takes one size alone, which no library records."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 3, 7, 11)


@pytest.mark.parametrize(
    "call",
    [
        lambda: surgeon.verify(_Waits(), _Waits()),
        lambda: surgeon.survey(_Waits(), (1, 3, 8, 8)),
    ],
)
def test_an_input_is_advised_for_python_too(call: Callable[[], object]) -> None:
    with pytest.raises(SurgeonError, match=re.escape("example=(1, 3, 224, 224)")):
        call()


def test_the_arguments_of_a_call_are_advised_for_python_too() -> None:
    with pytest.raises(SurgeonError, match=re.escape("(from Python, example={'input': (1, 3, 8, 8)})")):
        surgeon.survey(_net(), (torch.ones(1), 3))


def test_a_size_that_is_not_known_is_asked_for_in_python_too() -> None:
    with pytest.raises(PlanError, match=re.escape("example=(1, 3, 224, 224)")):
        surgeon.plan(nn.Sequential(_Waits(), _net()), {"rules": [{"swap": "acblock", "match": {"size": 9}}]})


@pytest.mark.parametrize("command", [surgeon.plan, surgeon.convert])
def test_what_is_no_recipe_is_refused(command: Callable[..., object]) -> None:
    with pytest.raises(RecipeError, match="int is given as a recipe, which is a name, a path, a dict or a Recipe"):
        command(_net(), 3)


def test_a_plan_is_not_planned_again() -> None:
    with pytest.raises(RecipeError, match="`convert` carries out a plan"):
        surgeon.plan(_net(), surgeon.plan(_net(), "acnet"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (OrderedDict(), "an OrderedDict is not a model. If it holds weights, build the network and load_state_dict"),
        ({}, "a dict is not a model. If it holds weights"),
        (nn.ReLU, "ReLU is a class, not a model. Build it: ReLU(…)"),
        (3, "an int is not a model. Give an nn.Module."),
    ],
)
def test_what_is_no_model_is_refused(given: object, says: str) -> None:
    for command in (surgeon.survey, surgeon.fuse, surgeon.history):
        with pytest.raises(ModelError, match=re.escape(says)):
            command(given)  # type: ignore[operator]


def test_a_file_is_named_by_a_text_or_a_path() -> None:
    with pytest.raises(ModelError, match="int is given as the name of a file or network"):
        surgeon.load(3)  # type: ignore[arg-type]


def test_a_history_is_printed_in_a_line_for_each_step() -> None:
    made = surgeon.fuse(surgeon.convert(_net(), "acnet", (1, 3, 16, 16)))
    convert, fuse = map(repr, surgeon.history(made))
    assert convert.startswith("Operation('convert', plan=<acnet: 2 of 2 convs swapped>, parent='")
    assert fuse.startswith("Operation('fuse', parent='")
    assert max(len(convert), len(fuse)) < 120


class _Branches(nn.Module):
    """Looks at the values of its input, and takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(2 * x if x.mean() > 1e9 else x)


class _Selects(_Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * len(x[x > 0])


@pytest.mark.parametrize("kind", [_Branches, _Selects])
def test_an_input_is_found_for_a_network_that_looks_at_values(kind: type[nn.Module]) -> None:
    surveyed = surgeon.survey(kind())
    assert str(surveyed.inputs) == "1×3×224×224"
    assert surveyed.sites[0].cost.macs


def test_a_network_that_looks_at_values_is_run_once_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, ...]] = []

    class Refuses(_Branches):
        def forward(self, x: Tensor) -> Tensor:
            if not x.is_meta:
                runs.append(tuple(x.shape))
            assert x.mean() > 1e9
            return x

    assert surgeon.survey(Refuses()).inputs is None
    assert runs == [(1, 3, 224, 224)]
