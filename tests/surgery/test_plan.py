"""A plan says what will be done before anything is; a person may edit it; it is carried out exactly or refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torchvision
from helpers import relative, shake_
from tiny import SHAPE, ConvNorm, conv3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from surgeon.analysis.network import Network
from surgeon.blocks.acblock import ACBlock
from surgeon.conv.spec import ConvSpec
from surgeon.errors import PlanError, RecipeError
from surgeon.recipes import recipe
from surgeon.surgery import plan as plans
from surgeon.surgery.make import make
from surgeon.surgery.plan import Entry, Plan


def rules(*texts: str) -> recipe.Recipe:
    return recipe.parse(f"{{surgeon: 1, title: T, rules: [{', '.join(texts)}]}}", "r.yaml")


def own() -> tiny.Own:
    torch.manual_seed(0)
    return shake_(tiny.Own().double()).eval()


def split(net: nn.Module) -> Plan:
    """A plan with random strips, so that it shows who draws what."""
    return surgeon.plan(net, "acnet", SHAPE, overrides=["rules[0].with.init=split"])


def edited(plan: Plan, edit: Callable[[dict[str, Any]], object]) -> Plan:
    """Edit a plan as a person does: in its file."""
    data = json.loads(plan.dump(as_json=True))
    edit(data)
    return plans.parse(json.dumps(data), "plan.json")


# What a plan is


def test_the_same_network_gets_the_same_plan():
    assert surgeon.plan(own(), "acnet", SHAPE).dump() == surgeon.plan(own(), "acnet", SHAPE).dump()
    other_numbers = shake_(own(), seed=3)
    assert surgeon.plan(other_numbers, "acnet", SHAPE) == surgeon.plan(own(), "acnet", SHAPE)


def test_planning_touches_no_tensor():
    """A network without numbers is enough, and gets the same plan as one with them."""
    with torch.device("meta"):
        empty = torchvision.models.resnet18()
    plan = surgeon.plan(empty, "acnet", (1, 3, 64, 64))
    assert all(p.is_meta for p in empty.parameters())
    assert len(plan.swaps) == 16
    assert plan == surgeon.plan(torchvision.models.resnet18(), "acnet", (1, 3, 64, 64))


def test_every_conv_is_in_the_plan_swapped_or_with_a_reason():
    plan = surgeon.plan(torchvision.models.resnet18(), "acnet", (1, 3, 64, 64))
    assert len(plan.convs) == 20
    assert {entry.path: entry.skip for entry in plan.convs if entry.skip} == {
        "conv1": "no rule claims it",
        **dict.fromkeys([f"layer{i}.0.downsample.0" for i in (2, 3, 4)], "no rule claims it"),
    }
    first = plan.swaps[0]
    assert (first.path, first.conv, first.calls, first.size) == (
        "layer1.0.conv1",
        "64→64, 3x3, padding=1, no bias",
        1,
        (16, 16),
    )
    assert (first.takes_norm, first.options) == (
        ("layer1.0.bn1",),
        {"form": "branches", "init": "takeover", "placement": "skeleton"},
    )


@pytest.mark.parametrize("as_json", [False, True], ids=["yaml", "json"])
@pytest.mark.parametrize("build", [own, tiny.TwoParents, tiny.NeverCalled, conv3, tiny.ActsOnValuesWithStages])
def test_a_plan_that_is_written_is_read_back_as_it_was(build: Callable[[], nn.Module], as_json: bool, tmp_path: Path):
    given = rules("{swap: acblock, match: {kernel: 3}, with: {init: scratch, gamma: 0.3333333333333333}}")
    plan = surgeon.plan(build(), given, SHAPE, seed=7)
    text = plan.dump(as_json=as_json)
    assert plans.parse(text, "plan") == plan
    assert plans.parse(text, "plan").dump(as_json=as_json) == text
    file = tmp_path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    assert plans.read(file) == plan


def test_a_plan_keeps_its_recipe_as_it_was_written():
    text = recipe.load("acnet").text
    plan = plans.parse(split(own()).dump(), "plan.yaml")
    assert (plan.recipe.name, plan.recipe.text) == ("acnet", text)
    assert plan.recipe.overrides == ("rules[0].with.init=split",)


# Carrying one out


def test_a_plan_that_was_read_back_converts_to_the_same_numbers():
    net = own()
    plan = split(net)
    one = surgeon.convert(net, plan).state_dict()
    other = surgeon.convert(net, plans.parse(plan.dump(), "plan.yaml")).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_seed_decides_the_random_strips():
    net = own()
    strips = {
        seed: surgeon.convert(net, "acnet", SHAPE, overrides=["rules[0].with.init=split"], seed=seed).stem.conv.ver_conv
        for seed in (0, 1)
    }
    assert not torch.equal(strips[0].weight, strips[1].weight)


def test_pruning_an_entry_leaves_that_conv_alone_and_the_others_as_they_would_be():
    net = own()
    plan = split(net)
    whole = surgeon.convert(net, plan)
    pruned = surgeon.convert(net, edited(plan, lambda data: data["convs"].pop(0)))
    assert type(pruned.stem.conv) is nn.Conv2d
    assert type(pruned.stem.bn) is nn.BatchNorm2d
    assert torch.equal(pruned.stem.conv.weight, net.stem.conv.weight)
    whole_state, state = whole.body.state_dict(), pruned.body.state_dict()
    assert state.keys() == whole_state.keys()
    assert all(torch.equal(state[key], whole_state[key]) for key in state)
    assert relative(pruned(x()), net(x())) <= 1e-12


@pytest.mark.parametrize("init", ["takeover", "split", "scratch"])
def test_what_is_random_is_drawn_in_float64_from_the_seed_and_the_path(init: str):
    net = own()
    block = surgeon.convert(net, "acnet", SHAPE, overrides=[f"rules[0].with.init={init}"], seed=3).stem.conv
    digest = hashlib.sha256(b"3:stem.conv").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    convs = (*([block.square_conv] if init == "scratch" else []), block.ver_conv, block.hor_conv)
    for conv in convs:
        shape, fan_in = conv.weight.shape, conv.weight[0].numel()
        if init == "split":
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            expected = drawn * net.stem.conv.weight.square().mean().sqrt()
        else:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            expected = (drawn * 2 - 1) / math.sqrt(fan_in)
        assert torch.equal(conv.weight, expected)


RANDOM = {
    "acnet": [["rules[0].with.init=takeover"], ["rules[0].with.init=split"], ["rules[0].with.init=scratch"]],
    "hetconv-p4": [["rules[0].with.init=scratch"]],
}


@pytest.mark.parametrize(("name", "overrides"), [(name, one) for name, each in RANDOM.items() for one in each])
def test_planning_draws_nothing(name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    surveyed = surgeon.analysis.sites.survey(Network(net))
    for law in ("rand", "randn"):
        monkeypatch.setattr(torch, law, lambda *_, law=law, **__: pytest.fail(f"torch.{law} was called"))
    assert make(recipe.load(name, overrides), surveyed).swaps
    with pytest.raises(pytest.fail.Exception, match="was called"):
        surgeon.convert(net, name, overrides=overrides)


def x() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_swap_that_a_person_turns_into_a_skip_is_skipped():
    def edit(data: dict[str, Any]) -> None:
        for key in ("swap", "with", "takes_norm"):
            data["convs"][0].pop(key)
        data["convs"][0]["skip"] = "I like it"

    net = own()
    plan = edited(split(net), edit)
    assert plan.convs[0].skip == "I like it"
    converted = surgeon.convert(net, plan)
    assert type(converted.stem.conv) is nn.Conv2d
    assert isinstance(converted.body[0].conv, ACBlock)


def test_options_that_a_person_edits_are_honoured():
    net = own()
    plan = edited(split(net), lambda data: data["convs"][0]["with"].update(init="takeover", placement="border"))
    converted = surgeon.convert(net, plan)
    assert converted.stem.conv.placement == "border"
    assert not converted.stem.conv.ver_bn.weight.any()
    assert converted.body[0].conv.placement == "skeleton"
    assert converted.body[0].conv.ver_bn.weight.all()


def test_a_norm_that_a_person_takes_out_of_the_plan_stays():
    net = own()
    converted = surgeon.convert(net, edited(split(net), lambda data: data["convs"][0].pop("takes_norm")))
    assert type(converted.stem.bn) is nn.BatchNorm2d
    assert isinstance(converted.stem.conv, ACBlock)
    assert relative(converted(x()), net(x())) <= 1e-12


# Misfits: each names the conv and says why


def misfit(net: nn.Module, plan: Plan) -> str:
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(PlanError) as caught:
        surgeon.convert_(net, plan)
    assert net.state_dict().keys() == before.keys(), "a refused plan changes nothing"
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda entry: entry.update(path="stem.cnov"), "stem.cnov: there is no such conv"),
        (lambda entry: entry.update(path="head"), "head: there is no such conv"),
        (lambda entry: entry.update(conv="4→4, 5x5"), "stem.conv: the plan says 4→4, 5x5, the model has 4→4, 3x3"),
        (lambda entry: entry.update(aliases=["other"]), "stem.conv: the model names it stem.conv"),
        (lambda entry: entry.update(takes_norm=["body.0.bn"]), "stem.conv: it cannot take over body.0.bn"),
        (lambda entry: entry.update(takes_norm=["nowhere"]), "stem.conv: it cannot take over nowhere"),
        (lambda entry: entry["with"].update(init="magic"), "stem.conv: with.init: "),
        (lambda entry: entry["with"].update(colour="red"), "stem.conv: with.colour: "),
        (lambda entry: entry["with"].update(gamma=0.5), "gamma is for init: scratch"),
    ],
)
def test_an_edited_plan_that_does_not_fit_is_refused(edit: Callable[[dict[str, Any]], object], says: str):
    net = own()
    said = misfit(net, edited(split(net), lambda data: edit(data["convs"][0])))
    assert says in said
    assert "stem" in said or "head" in said


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("c_in", 5, "5→4"),
        ("c_out", 5, "4→5"),
        ("kernel", [3, 5], "3x5"),
        ("stride", [1, 2], "stride=1x2"),
        ("padding", "same", "padding=same"),
        ("dilation", [2, 1], "dilation=2x1"),
        ("groups", 2, "groups=2"),
        ("bias", True, "3x3, padding=1, the model"),
        ("padding_mode", "circular", "mode=circular"),
    ],
)
def test_every_field_of_a_conv_has_to_fit(field: str, value: object, says: str):
    net = own()
    said = misfit(net, edited(split(net), lambda data: data["convs"][0]["conv"].update({field: value})))
    assert "stem.conv: the plan says " in said
    assert says in said


SKIP = "`skip: reason`"


@pytest.mark.parametrize(
    ("edit", "says", "todo"),
    [
        (
            lambda entry: entry.update(path="stem.cnov"),
            "stem.cnov: there is no such conv; the nearest name is stem.conv",
            "`surgeon survey MODEL` lists the names",
        ),
        (
            lambda entry: entry["with"].update(inti="split"),
            "with.inti: unknown key 'inti'; there are form, gamma, init, placement (did you mean 'init'?)",
            "`surgeon blocks` lists the options",
        ),
        (
            lambda entry: entry["with"].update(init="splt"),
            "with.init: 'splt' is not one of takeover, split, scratch (did you mean 'split'?)",
            "`surgeon blocks` lists the options",
        ),
        (
            lambda entry: entry.update(takes_norm=["stem.bn9"]),
            "it cannot take over stem.bn9: there is no such module; its norm is stem.bn",
            "Write `takes_norm: [stem.bn]`.",
        ),
        (
            lambda entry: entry.update(takes_norm=["body.0.bn"]),
            "it cannot take over body.0.bn; its norm is stem.bn",
            "Write `takes_norm: [stem.bn]`.",
        ),
        (lambda entry: entry.update(conv="4→4, 5x5"), "the plan says 4→4, 5x5", "describes the convs as they are now"),
    ],
)
def test_the_advice_fits_the_misfit(edit: Callable[[dict[str, Any]], object], says: str, todo: str):
    said = misfit(net := own(), edited(split(net), lambda data: edit(data["convs"][0])))
    assert says in said
    assert todo in said
    assert SKIP not in said


def test_a_conv_that_cannot_be_swapped_is_to_be_skipped():
    net = tiny.Own()
    plan = surgeon.plan(net, "acnet", SHAPE)
    net.stem.conv.register_forward_hook(print)
    assert SKIP in misfit(net, plan)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  swap: acblock", "  swap: acblok", "convs[0] (conv).swap: no block called 'acblok'"),
        ("  swap: acblock", "  swap: acblok", "(did you mean 'acblock'?)"),
        ("  swap: acblock", "  swap: acblock\n  skip: both", "convs[0] (conv): has both swap and skip; delete one"),
        ("  swap: acblock\n", "", "convs[0] (conv): needs either swap (a block) or skip (a reason)"),
        ("  swap: acblock", "  swap: acblock\n  swap: octave", "convs[0] (conv)"),
    ],
)
def test_a_fault_of_an_entry_names_its_conv(old: str, new: str, says: str):
    text = surgeon.plan(ConvNorm(), "acnet", SHAPE).dump()
    with pytest.raises(RecipeError) as caught:
        plans.parse(text.replace(old, new, 1), "plan.yaml")
    assert says in str(caught.value)


def in_format_1(plan: Plan, words: str) -> Plan:
    def edit(data: dict[str, Any]) -> None:
        data["surgeon-plan"] = 1
        data["convs"] = [{**entry, "conv": words} for entry in data["convs"]]

    return edited(plan, edit)


def test_a_plan_of_format_1_is_carried_out_whatever_a_conv_is_called_today(monkeypatch: pytest.MonkeyPatch):
    plan = surgeon.plan(ConvNorm(), "acnet", SHAPE)
    old = in_format_1(plan, "4→4, 3x3, padding=1")
    monkeypatch.setattr(ConvSpec, "__str__", lambda self: "worded otherwise")
    assert old.convs[0].conv == "4→4, 3x3, padding=1"
    assert isinstance(surgeon.convert(ConvNorm(), old).conv, ACBlock)
    assert plans.parse(old.dump(), "plan.yaml") == old


def test_a_plan_of_format_1_fits_only_the_conv_that_its_words_are_for():
    plan = surgeon.plan(ConvNorm(), "acnet", SHAPE)
    said = misfit(ConvNorm(), in_format_1(plan, "4→4, 3x3"))
    assert "conv: the plan says 4→4, 3x3, the model has 4→4, 3x3, padding=1" in said


def test_a_conv_is_one_line_of_a_plan_without_defaults():
    text = surgeon.plan(ConvNorm(conv3(dilation=2)), "acnet", SHAPE).dump()
    assert "\n  conv: {c_in: 4, c_out: 4, kernel: [3, 3], padding: [1, 1], dilation: [2, 2]}\n" in text


def test_what_is_no_conv2d_is_named():
    plan = surgeon.plan(nn.Sequential(conv3(), nn.ConvTranspose2d(4, 4, 3)), "acnet", SHAPE)
    assert plans.parse(plan.dump(), "plan.yaml") == plan
    assert plan.to_dict()["convs"][1]["conv"] == plan.convs[1].conv == "ConvTranspose2d"


def test_all_misfits_are_told_at_once():
    def edit(data: dict[str, Any]) -> None:
        data["convs"][0]["conv"] = "another"
        data["convs"][1]["takes_norm"] = ["elsewhere"]
        data["convs"].append(data["convs"][2])

    said = misfit(net := own(), edited(split(net), edit))
    assert "\n  stem.conv: the plan says another" in said
    assert "\n  body.0.conv: it cannot take over elsewhere" in said
    assert "\n  body.1.conv: it is in the plan twice" in said


def test_a_plan_for_another_network_is_refused():
    said = misfit(tiny.Own(classes=6), surgeon.plan(tiny.Own(), "acnet", SHAPE))
    assert "another network" in said


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"bias": False},
    ],
    ids=str,
)
def test_geometry_that_no_tensor_shows_makes_another_network(change: dict[str, object]):
    plan = surgeon.plan(ConvNorm(), "acnet", SHAPE)
    assert "another network" in misfit(ConvNorm(conv3(**change)), plan)


def test_trained_weights_do_not_make_another_network():
    net = own()
    plan = surgeon.plan(net, "acnet", SHAPE)
    shake_(net, seed=5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    assert isinstance(surgeon.convert(net, plan).stem.conv, ACBlock)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda net: net.stem.conv.register_forward_hook(print), "stem.conv: hooks are attached"),
        (lambda net: net.stem.bn.register_forward_hook(print), "stem.conv: it cannot take over stem.bn: hooks"),
        (
            lambda net: setattr(net.stem.conv, "weight", net.body[0].conv.weight),
            "stem.conv: it shares its weights",
        ),
    ],
)
def test_what_came_in_the_way_since_the_plan_was_made_is_noticed(spoil: Callable[[Any], object], says: str):
    net = tiny.Own()
    plan = surgeon.plan(net, "acnet", SHAPE)
    spoil(net)
    assert says in misfit(net, plan)


def test_a_conv_that_the_block_refuses_is_not_swapped_by_hand_either():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), conv3())

    def edit(data: dict[str, Any]) -> None:
        assert "no rule" in data["convs"][0].pop("skip")
        data["convs"][0]["swap"] = "acblock"

    said = misfit(net, edited(surgeon.plan(net, "acnet", SHAPE), edit))
    assert "0: a 1x1 kernel has no rows and columns" in said


def test_a_plan_that_swaps_nothing_is_refused_with_the_reasons():
    net = own()
    assert "nothing is swapped" in misfit(net, edited(split(net), lambda data: data["convs"].clear()))


# Faults of the file: where they stand


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  swap: acblock", "  swop: acblock", "swop"),
        ("  swap: acblock\n", "", "swap"),
        ("  calls: 1", "  calls: one", "whole number"),
        ("  takes_norm: [stem.bn]", "  takes_norm: [stem.bn]\n  skip: both", "swap"),
        ("surgeon-plan: 2", "surgeon-plan: 3", "surgeon-plan"),
        ("c_in: 4, c_out: 4", "c_in: 4, c_aut: 4", "unknown key 'c_aut'"),
        ("kernel: [3, 3]", "kernel: [3, three]", "whole number"),
        ("conv: {", "conv: 7 # {", "7 is not a mapping"),
        ("model: ", "modle: ", "modle"),
    ],
)
def test_a_fault_of_a_plan_file_has_its_place(old: str, new: str, says: str):
    text = surgeon.plan(ConvNorm(), "acnet", SHAPE).dump().replace("[bn]", "[stem.bn]")
    assert old in text
    with pytest.raises(RecipeError) as caught:
        plans.parse(text.replace(old, new, 1), "plan.yaml")
    faults = [str(fault) for fault in caught.value.faults]
    assert any(says in fault for fault in faults)
    for fault in faults:
        file, line, column = fault.split(":")[:3]
        assert file == "plan.yaml"
        assert int(line) >= 1
        assert int(column) >= 1
    if new.strip() and "\n" not in new:
        assert any(fault.startswith(f"plan.yaml:{line_of(text, old)}:") for fault in faults)


def test_a_fault_of_a_whole_entry_stands_where_the_entry_does():
    text = surgeon.plan(ConvNorm(), "acnet", SHAPE).dump()
    with pytest.raises(RecipeError, match=r"convs\[0\] \(conv\): has both swap and skip") as caught:
        plans.parse(text.replace("swap: acblock\n  with", "swap: acblock\n  skip: why\n  with"), "plan.yaml")
    assert caught.value.faults[0].where == f"plan.yaml:{line_of(text, 'path: conv')}:3"


@pytest.mark.parametrize("text", ["", "[1, 2]", "surgeon-plan: [", "{}", "\0"])
def test_what_is_no_plan_is_refused(text: str):
    with pytest.raises(RecipeError) as caught:
        plans.parse(text, "plan.yaml")
    assert "plan.yaml" in str(caught.value)


def test_a_plan_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml"):
        plans.read(tmp_path / "nothing.yaml")


# Rules


def test_a_rule_that_claims_nothing_is_an_error_with_the_nearest_names():
    given = rules("{swap: acblock, match: {name: layers1.0.conv1}}", "{swap: acblock}")
    with pytest.raises(PlanError, match=r"rules\[0\] \(r\.yaml:1:\d+\) claims no conv.*layer1\.0\.conv1") as caught:
        surgeon.plan(torchvision.models.resnet18(), given, (1, 3, 64, 64))
    assert "optional" in caught.value.todo
    assert "20" in caught.value.todo
    assert caught.value.facts["rule"].index == 0


def test_a_rule_that_comes_too_late_is_told_so():
    given = rules("{swap: acblock}", "{leave: why, match: {name: stem.conv}}")
    with pytest.raises(PlanError, match=r"rules\[1\].*claims no conv: stem\.conv went to an earlier rule"):
        surgeon.plan(own(), given, SHAPE)


def test_an_optional_rule_may_be_idle_or_late():
    given = rules("{swap: acblock}", "{leave: why, match: {name: stem.conv}, optional: true}",
                  "{leave: why, match: {name: nowhere}, optional: true}")  # fmt: skip
    assert len(surgeon.plan(own(), given, SHAPE).swaps) == 3


def test_the_first_rule_that_claims_a_conv_wins_and_its_reason_stands_in_the_plan():
    given = rules("{leave: the stem sees raw pixels, match: {name: stem.*}}", "{swap: acblock, match: {kernel: 3}}")
    stem, *body = surgeon.plan(own(), given, SHAPE).convs
    assert (stem.skip, stem.swap, stem.rule) == ("the stem sees raw pixels", None, "rules[0] (r.yaml:1:32)")
    assert [entry.rule for entry in body] == ["rules[1] (r.yaml:1:90)"] * 2


def test_a_refusal_stands_in_the_plan():
    net = nn.Sequential(nn.Conv2d(4, 4, 2), conv3())
    even, odd = surgeon.plan(net, rules("{swap: acblock}"), SHAPE).convs
    assert "even" in str(even.skip)
    assert odd.swap == "acblock"


def test_a_rule_that_asks_for_a_size_needs_an_input():
    given = rules("{swap: acblock, match: {size: {min: 9}}}", "{leave: small, optional: true}")
    net = own()
    with pytest.raises(PlanError, match=r"rules\[0\].*size of feature maps.*--input"):
        make(given, surgeon.analysis.sites.survey(Network(net)))
    assert [entry.skip for entry in surgeon.plan(net, given, (1, 4, 9, 9)).convs] == [None, None, "small"]


# Costs


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(net: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds of every module of a network, by path; '' is the whole."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(shape, dtype=next(net.parameters()).dtype))
    root = type(net).__name__
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}


def under(counts: dict[str, int], entry: Entry) -> int:
    """What is counted under any name of a conv: the counter has one of them."""
    return next(counts[path] for path in entry.paths if path in counts)


def costs_of(entry: Entry, net: nn.Module) -> int:
    """Parameters of what stands where the entry's conv and its norm stood."""
    norms = [net.get_submodule(path) for path in entry.takes_norm[:1]]
    return params(nn.ModuleList([net.get_submodule(entry.path), *norms]))


@pytest.mark.parametrize(
    ("build", "shape", "swaps"),
    [
        (torchvision.models.resnet18, (1, 3, 64, 64), 16),
        (own, SHAPE, 3),
        (tiny.TwoParents, SHAPE, 1),
        (tiny.CalledTwiceNormAfterEach, SHAPE, 1),
        (tiny.ReadTwice, SHAPE, 1),
        (lambda: torchvision.models.mobilenet_v2(width_mult=0.1), (1, 3, 64, 64), 18),
        pytest.param(tiny.CalledAtTwoSizes, SHAPE, 1),
        pytest.param(tiny.CalledByKeyword, SHAPE, 1),
    ],
    ids=["resnet18", "own", "shared", "called twice", "no norm", "depthwise", "two sizes", "keyword"],
)
def test_costs_are_those_of_the_networks(build: Callable[[], nn.Module], shape: tuple[int, ...], swaps: int):
    net = build()
    plan = surgeon.plan(net, "acnet", shape)
    converted = surgeon.convert(net, plan)
    before, after = macs(net, shape), macs(converted, shape)
    assert len(plan.swaps) == swaps
    assert (plan.total.params.before, plan.total.params.after) == (params(net), params(converted))
    assert (plan.total.macs.before, plan.total.macs.after) == (before[""], after[""])
    assert plan.total.macs.after > plan.total.macs.before
    for entry in plan.convs:
        assert entry.params.before == costs_of(entry, net)
        assert entry.params.after == costs_of(entry, converted)
        assert entry.macs.before == under(before, entry)
        assert entry.macs.after == under(after, entry)


def test_a_conv_that_is_never_called_costs_parameters_only():
    net = tiny.NeverCalled()
    plan = surgeon.plan(net, "acnet", SHAPE)
    spare = next(entry for entry in plan.convs if entry.path == "spare")
    assert (spare.calls, spare.macs) == (None, None)
    converted = surgeon.convert(net, plan)
    assert (plan.total.params.after, plan.total.macs.after) == (params(converted), macs(converted, SHAPE)[""])


def test_without_an_input_there_are_parameters_only():
    plan = make(recipe.load("acnet"), surgeon.analysis.sites.survey(Network(own())))
    assert (plan.input, plan.total.macs) == (None, None)
    assert all(entry.macs is None and entry.size is None for entry in plan.convs)
    assert plan.total.params.after == params(surgeon.convert(own(), plan))


def test_a_network_without_numbers_can_be_converted_too():
    with torch.device("meta"):
        net = ConvNorm()
    assert isinstance(surgeon.convert(net, "acnet", SHAPE).conv, ACBlock)


# Costs of an edited plan


def hand_swapped(plan: Plan, path: str, **more: Any) -> Plan:
    """Swap one conv that the plan leaves alone, as a user does."""

    def edit(data: dict[str, Any]) -> None:
        entry = next(one for one in data["convs"] if one["path"] == path)
        del entry["skip"]
        entry.update(swap="acblock", **more)

    return edited(plan, edit)


def carried_out(net: nn.Module, plan: Plan, example: Any = None) -> Plan:
    """The plan as the history of the converted network holds it."""
    return Plan.model_validate(surgeon.history(surgeon.convert(net, plan, example))[-1].plan)


FIRST = {"rules": [{"swap": "acblock", "match": {"name": "stem.conv"}}]}
BOTH = {"rules": [{"swap": "acblock", "match": {"name": ["stem.conv", "body.0.conv"]}}]}
OCTAVE = {"rules": [{"swap": "octave"}]}


def without_rules(plan: Plan) -> dict[str, Any]:
    """All that is counted in a plan."""
    data = plan.to_dict()
    for one in data["convs"]:
        one.pop("rule", None)
    return {key: data[key] for key in ("total", "convs", "input")}


def test_a_plan_that_nobody_edited_is_carried_out_as_it_stands():
    net = own()
    for name in ("acnet", "hetconv-p4", OCTAVE):
        plan = surgeon.plan(net, name, (1, 4, 32, 32))
        assert carried_out(net, plan) == plan


def test_an_edited_plan_costs_what_a_plan_with_these_swaps_costs():
    net = own()
    first, both = surgeon.plan(net, FIRST, SHAPE), surgeon.plan(net, BOTH, SHAPE)
    norm = next(entry.takes_norm for entry in both.convs if entry.path == "body.0.conv")
    added = carried_out(net, hand_swapped(first, "body.0.conv", takes_norm=list(norm)))
    assert without_rules(added) == without_rules(both)
    assert added.total != first.total


def test_a_conv_that_was_taken_out_of_the_plan_is_counted_as_one_that_stays():
    net = own()
    plan = surgeon.plan(net, BOTH, SHAPE)
    done = carried_out(net, edited(plan, lambda data: data["convs"].pop(0)))
    assert len(done.convs) == len(plan.convs)
    assert done.convs[0].skip == "it is not in the plan"
    assert done.total.params.before == plan.total.params.before
    assert done.total.params.after < plan.total.params.after


def test_costs_are_for_the_input_that_is_given_with_the_plan():
    net = own()
    done = carried_out(net, surgeon.plan(net, FIRST, SHAPE), (2, *SHAPE[1:3], 2 * SHAPE[3]))
    assert done == surgeon.plan(net, FIRST, (2, *SHAPE[1:3], 2 * SHAPE[3]))


def test_a_swap_that_leaves_its_norm_says_that_it_keeps_its_function_in_eval_mode_only():
    net = own()
    done = carried_out(net, hand_swapped(surgeon.plan(net, FIRST, SHAPE), "body.0.conv"))
    swapped = next(entry for entry in done.swaps if entry.path == "body.0.conv")
    assert swapped.note == "same function in eval mode only: takes_norm does not name body.0.bn"
    assert swapped.options == {"form": "branches", "init": "takeover", "placement": "skeleton"}


def test_an_edited_octave_plan_is_run_again():
    net = own()
    plan = surgeon.plan(net, OCTAVE, (1, 4, 32, 32))
    last = plan.swaps[-1].path
    done = carried_out(net, edited(plan, lambda d: d.update(convs=[c for c in d["convs"] if c["path"] != last])))
    assert len(done.swaps) == len(plan.swaps) - 1
    assert done.total.macs.after > plan.total.macs.after
