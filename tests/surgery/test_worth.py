"""What a plan says in its first line that was meant to save multiply-adds, and saves hardly any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.surgery import plan as plans
from surgeon.surgery.decide import settle


def conv(c_in: int = 16, c_out: int = 16, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def grouped() -> nn.Module:
    blocks = [nn.Sequential(conv(), nn.GroupNorm(2, 16), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(conv(3, 16), *blocks)


def mostly_linear() -> nn.Module:
    return nn.Sequential(conv(), conv(), nn.Flatten(), nn.Linear(16 * 32 * 32, 20_000))


def said(net: nn.Module, swap: str = "octave", **given: object) -> str | None:
    rules = [{"leave": "the stem", "match": {"in_channels": 3}, "optional": True}, {"swap": swap, **given}]
    shape = (1, 3 if net[0].in_channels == 3 else 16, 32, 32)
    return surgeon.plan(net, {"surgeon": 1, "title": "T", "rules": rules}, shape).saves_little


CASES = {
    "a norm that mixes channels": (
        grouped(),
        {},
        "saves no multiply-adds; 5 of 6 convs stay: it reads no low channels, and two streams would end right "
        "behind it, in a GroupNorm, which mixes channels; two streams go through batch norms, not through norms that "
        "mix channels",
    ),
    "small maps": (
        nn.Sequential(*[conv() for _ in range(3)], conv(16, 16, stride=2)),
        {"with": {"min_size": 40}},
        "saves no multiply-adds; 4 of 4 convs stay: its low map would be 16×16, smaller than min_size 40, and "
        "its input has no low channels; a larger input would change that, or a smaller `min_size`",
    ),
    "nothing that is claimed": (
        nn.Sequential(conv(16, 64), conv(64, 64), conv(64, 16, 1), conv(16, 16, 1), conv(16, 4, 1)),
        {"match": {"kernel": 1}},
        "saves 1 % of the multiply-adds; 2 of 5 convs stay: no rule claims it; a rule of the recipe that claims "
        "them would change that",
    ),
    "a stem that is all there is": (
        nn.Sequential(conv(3, 64), conv(64, 2, 1), conv(2, 2, 1)),
        {},
        "saves 3 % of the multiply-adds; 1 of 3 convs stays: the stem; rules[0] of the recipe says so",
    ),
    "linear layers": (
        mostly_linear(),
        {},
        "saves 1 % of the multiply-adds: its convs do 1 % of them; the others are in linear layers and matrix "
        "products, which no swap of convs changes",
    ),
    "a number of parts that does not fit": (
        nn.Sequential(conv(16, 20), conv(20, 20)),
        {"swap": "hetconv", "with": {"p": 16}},
        "saves no multiply-adds; 2 of 2 convs stay: 20 input and 20 output channels cannot be cut into 16 "
        "parts; 2, 4, 5, 10, 20 would do; another `p` would change that",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_plan_that_saves_little_says_why_and_what_would_change_that(what: str) -> None:
    net, rule, expected = CASES[what]
    assert said(net, **rule) == expected  # type: ignore[arg-type]


def test_one_that_saves_or_is_not_meant_to_says_nothing() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(16), conv())
    assert said(net) is None
    assert said(net, "hetconv", **{"with": {"p": 4}}) is None
    assert said(net, "acblock") is None


def test_it_is_the_first_line_of_plans_and_conversions_and_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    surgeon.save(mostly_linear(), "net.pt")
    recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]}
    Path("r.yaml").write_text(json.dumps(recipe))
    start = "saves 1 % of the multiply-adds: its convs do 1 % of them"
    for command in (["plan", "net.pt"], ["convert", "net.pt"]):
        assert run_surgeon(*command, "-r", "r.yaml", "--input=1,16,32,32") == 0
        assert capsys.readouterr().out.startswith(start)
    assert run_surgeon("plan", "net.pt", "-r", "r.yaml", "--input=1,16,32,32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["saves_little"].startswith(start)
    plan = surgeon.plan(surgeon.load("net.pt"), recipe, (1, 16, 32, 32))
    assert plans.parse(plan.dump(), "plan.yaml").saves_little == plan.saves_little
    print(plan)
    assert capsys.readouterr().out.startswith(start)


def test_an_edited_plan_is_judged_anew() -> None:
    net = nn.Sequential(conv(), conv(16, 64, 7), conv(64, 64, 7))
    plan = surgeon.plan(net, {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]}, (1, 16, 32, 32))
    assert plan.saves_little is None
    stays = {"swap": None, "options": {}, "note": None, "skip": "I say so"}
    pruned = plan.model_copy(
        update={"convs": (plan.convs[0], *(one.model_copy(update=stays) for one in plan.convs[1:]))}
    )
    settled = settle(pruned, surgeon.survey(net, (1, 16, 32, 32)))
    assert "2 of 3 convs stay: I say so" in str(settled.saves_little)
