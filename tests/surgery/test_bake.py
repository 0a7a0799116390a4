"""Convs whose tensors are computed at every call: baked, bit by bit, and then swapped like others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import relative, run_surgeon, shake_
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import surgeon
from surgeon.errors import CaptureError, PlanError
from surgeon.nn import ACBlock
from surgeon.surgery import bake

SHAPE = (2, 4, 12, 11)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def changed(*changes: Callable[[nn.Conv2d], object], of: Callable[[], nn.Conv2d] = conv) -> Callable[[], nn.Conv2d]:
    def build() -> nn.Conv2d:
        made = of()
        for change in changes:
            change(made)
        return made

    return build


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.rand_like(weight) < 0.5)


def frozen(made: nn.Conv2d) -> None:
    made.requires_grad_(False)


def spread_(made: nn.Conv2d) -> None:
    """Move what a weight is computed from, so that this shows."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)


KINDS = {
    "weight norm": changed(parametrizations.weight_norm),
    "weight norm, the old one": changed(nn.utils.weight_norm),
    "spectral norm": changed(parametrizations.spectral_norm),
    "spectral norm, the old one": changed(nn.utils.spectral_norm),
    "pruned taps": changed(lambda c: prune.l1_unstructured(c, "weight", 0.5)),
    "pruned filters": changed(lambda c: prune.ln_structured(c, "weight", 0.5, 2, 0)),
    "pruned twice": changed(
        lambda c: prune.l1_unstructured(c, "weight", 0.3), lambda c: prune.random_unstructured(c, "weight", 0.3)
    ),
    "weight and bias pruned": changed(
        lambda c: prune.l1_unstructured(c, "weight", 0.5), lambda c: prune.l1_unstructured(c, "bias", 0.5)
    ),
    "only its bias pruned": changed(lambda c: prune.l1_unstructured(c, "bias", 0.5)),
    "normed and pruned": changed(parametrizations.weight_norm, lambda c: prune.l1_unstructured(c, "bias", 0.5)),
    "parametrized by the user": changed(lambda c: parametrize.register_parametrization(c, "weight", Doubled())),
    "twice": changed(*(lambda c: parametrize.register_parametrization(c, "weight", Doubled()) for _ in range(2))),
    "its bias too": changed(
        parametrizations.weight_norm, lambda c: parametrize.register_parametrization(c, "bias", Doubled())
    ),
    "of another class": changed(parametrizations.weight_norm, of=lambda: Conv2dSame(4, 4, 3, stride=2)),
    "frozen": changed(nn.utils.weight_norm, frozen),
}
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def network(build: Callable[[], nn.Conv2d], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(build(), nn.BatchNorm2d(4), nn.ReLU(), conv())
    net(torch.randn(SHAPE))  # old norms compute their tensors in a run
    spread_(net[0])
    return shake_(net).to(dtype).eval()


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_what_was_computed_stays_bit_by_bit_and_the_original_is_untouched(
    build: Callable[[], nn.Conv2d], training: bool
) -> None:
    net = network(build)
    original, truth = net[0], net(x())
    state, kind = copy.deepcopy(net.state_dict()), type(original)
    net[0].train(training)
    made = bake.baked(original)
    assert isinstance(made, nn.Conv2d)
    assert type(made).__name__ in ("Conv2d", "Conv2dSame")
    assert list(made.state_dict()) == ["weight", "bias"]
    assert made.training == training
    assert bake.computes_its_tensors(made) is None
    assert pickle.loads(pickle.dumps(made)).weight.shape == made.weight.shape
    frozen_weight = not any(p.requires_grad for p in original.parameters())
    assert made.weight.requires_grad == (not frozen_weight)
    net[0].train(False)
    assert type(net[0]) is kind
    assert torch.equal(net(x()), truth)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    net[0] = made.eval()
    assert torch.equal(net(x()), truth)


@every_kind
def test_with_bake_it_is_swapped_and_proved(build: Callable[[], nn.Conv2d]) -> None:
    dtype = torch.float64 if build is KINDS["weight norm"] else torch.float32
    net = network(build, dtype)
    (skipped, _) = surgeon.plan(net, "acnet", SHAPE).convs
    assert "--bake (from Python, bake=True) makes its tensors permanent" in (skipped.skip or "")
    plan = surgeon.plan(net, "acnet", SHAPE, bake=True)
    assert plan.baked == ("0",)
    assert [entry.swap for entry in plan.convs] == ["acblock", "acblock"]
    assert plan.convs[0].takes_norm == ("1",)
    converted = surgeon.convert(net, "acnet", SHAPE, bake=True)
    assert isinstance(converted[0], ACBlock)
    with torch.no_grad():
        assert relative(converted(x(dtype)), net(x(dtype))) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert surgeon.history(surgeon.convert(net, plan)) == surgeon.history(converted)
    fused = surgeon.fuse(converted)
    for pair in ((net, converted), (converted, fused), (net, fused)):
        report = surgeon.verify(*pair, SHAPE)
        assert report.verdict == "equivalent", report
    with torch.no_grad():
        converted[0].square_conv.weight[0, 0, 0, 0] += 1e-5
    assert surgeon.verify(net, converted, SHAPE).verdict == "different"


def test_in_train_mode_it_computes_what_the_network_did() -> None:
    net = network(KINDS["weight norm"], torch.float64)[:2]  # behind the last conv there is no norm to take over
    converted = surgeon.convert(net, "acnet", SHAPE, bake=True)
    y = x(torch.float64)
    assert relative(converted.train()(y), net.train()(y)) <= 1e-12


def test_only_what_is_swapped_is_baked() -> None:
    net = nn.Sequential(*(KINDS["weight norm"]() for _ in range(3)))
    rules = [{"leave": "as it is", "match": {"name": "1"}}, {"swap": "acblock", "match": {"kernel": 3}}]
    recipe = {"surgeon": 1, "title": "T", "rules": rules}
    plan = surgeon.plan(net, recipe, SHAPE, bake=True)
    assert plan.baked == ("0", "2")
    assert plan.convs[1].skip == "as it is"
    converted = surgeon.convert(net, plan)
    assert [type(one).__name__ for one in converted] == ["ACBlock", "ParametrizedConv2d", "ACBlock"]
    assert surgeon.verify(net, converted, SHAPE).verdict == "equivalent"


def test_what_stays_computed_is_compared_with_itself_in_networks_built_twice() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(KINDS["weight norm"]() for _ in range(2))).eval()

    recipe = {"rules": [{"leave": "as it is", "match": {"name": "1"}}, {"swap": "acblock", "match": {"kernel": 3}}]}
    converted = surgeon.convert(build(), recipe, SHAPE, bake=True)
    assert surgeon.verify(build(), converted, SHAPE).verdict == "equivalent"
    twin = surgeon.convert(build(), recipe, SHAPE, bake=True)
    assert surgeon.verify(twin, surgeon.fuse(converted), SHAPE).verdict == "equivalent"
    nn.utils.parametrize.remove_parametrizations(converted[1], "weight")
    assert surgeon.verify(build(), converted, SHAPE).verdict != "equivalent"


def test_two_conversions_that_bake_are_proved_together() -> None:
    net = nn.Sequential(KINDS["weight norm"](), KINDS["pruned taps"]()).eval()
    rules = [{"swap": "acblock", "match": {"name": "0"}}]
    once = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": rules}, SHAPE, bake=True)
    twice = surgeon.convert(once, "acnet", SHAPE, bake=True)
    assert [step.plan["baked"] for step in surgeon.history(twice)] == [["0"], ["1"]]
    report = surgeon.verify(net, twice, SHAPE)
    assert report.verdict == "equivalent", report
    assert "A is compared with baked tensors in 0, 1" in report.remarks


def shared() -> nn.Module:
    net = nn.Sequential(conv(), conv())
    net[1].weight = net[0].weight
    return nn.Sequential(nn.utils.weight_norm(net[0]), net[1])


def shares_its_direction() -> nn.Module:
    net = nn.Sequential(nn.utils.weight_norm(conv()), conv())
    net[1].weight = net[0].weight_v
    return net


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (shares_its_direction, "what its tensors are computed from is shared with another module"),
        (
            lambda: nn.Sequential(
                changed(lambda c: parametrize.register_parametrization(c, "weight", Noisy()))(), conv()
            ),
            "its tensors are not the same at every call in eval mode, so there are none to keep",
        ),
    ],
)
def test_what_cannot_be_baked_stays_with_a_reason(build: Callable[[], nn.Module], why: str) -> None:
    plan = surgeon.plan(build().eval(), "acnet", SHAPE, bake=True)
    assert plan.baked == ()
    assert plan.convs[0].skip == why


def test_after_an_error_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(KINDS["weight norm"])
    held, state, truth = net[0], copy.deepcopy(net.state_dict()), net(x())

    def fails(*_: object, **__: object) -> None:
        raise CaptureError("it fails", todo="")

    monkeypatch.setattr("surgeon.surgery.decide.carry_out_", fails)
    with pytest.raises(CaptureError, match="it fails"):
        surgeon.convert_(net, "acnet", SHAPE, bake=True)
    assert net[0] is held
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(x()), truth)


def test_a_network_without_such_convs_is_planned_as_ever() -> None:
    net = nn.Sequential(conv())
    assert surgeon.plan(net, "acnet", SHAPE, bake=True) == surgeon.plan(net, "acnet", SHAPE)
    assert "baked" not in surgeon.plan(net, "acnet", SHAPE).to_dict()


def test_one_conv_under_two_names_is_baked_under_both() -> None:
    made = KINDS["weight norm"]()
    net = nn.Sequential(made, made).eval()
    converted = surgeon.convert(net, "acnet", SHAPE, bake=True)
    assert converted[0] is converted[1]
    assert isinstance(converted[0], ACBlock)


def test_a_plan_that_bakes_something_else_is_refused() -> None:
    net = network(KINDS["weight norm"])
    plan = surgeon.plan(net, "acnet", SHAPE, bake=True)
    for name in ("3", "nothing.here", ""):
        with pytest.raises(PlanError, match=r"there is no conv of that name whose tensors are computed.*`baked`"):
            surgeon.convert(net, plan.model_copy(update={"baked": (name,)}))
    with pytest.raises(PlanError, match="makes its tensors permanent"):
        surgeon.convert(net, plan.model_copy(update={"baked": ()}))
    with pytest.raises(PlanError, match="another network"):
        surgeon.convert(nn.Sequential(KINDS["weight norm"]()), plan)
    with pytest.raises(PlanError, match="the plan bakes nothing"):
        surgeon.convert(net, surgeon.plan(net, "acnet", SHAPE), bake=True)


NETS = """
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

def make():
    return nn.Sequential(
        parametrizations.weight_norm(Conv2dSame(4, 4, 3, stride=2)),
        nn.BatchNorm2d(4),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    ).eval()
"""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_from_the_command_line(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / f"bakes{suffix[1:]}.py"
    module.write_text(NETS, encoding="utf-8")
    net, plan, made, fused = (
        f"{module}:make",
        tmp_path / "plan.yaml",
        tmp_path / f"made{suffix}",
        tmp_path / f"f{suffix}",
    )
    shape, arch = ("--input", "1,4,9,8"), net if suffix == ".safetensors" else None
    original = surgeon.load(net)
    assert run_surgeon("convert", net, "-r", "acnet", "-o", made, *shape) == 2
    assert "--bake" in capsys.readouterr().err
    assert run_surgeon("plan", net, "-r", "acnet", "--bake", "-o", plan, *shape) == 0
    assert "2 convs baked: their computed tensors become ordinary ones" in capsys.readouterr().out
    unbaked = tmp_path / "unbaked.yaml"
    assert run_surgeon("plan", net, "-r", "acnet", "-o", unbaked, *shape) == 0
    assert run_surgeon("convert", net, "--plan", unbaked, "--bake", "-o", made, *shape) == 2
    assert "the plan bakes nothing. Make one with surgeon plan --bake" in capsys.readouterr().err
    assert run_surgeon("convert", net, "-r", "acnet", "--bake", "-o", made, *shape) == 0
    assert "2 convs baked" in capsys.readouterr().out
    assert surgeon.verify(original, surgeon.load(made, arch=arch), (1, 4, 9, 8)).verdict == "equivalent"
    assert run_surgeon("convert", net, "--plan", plan, "-o", made, "-f", *shape) == 0
    assert run_surgeon("fuse", made, *(("--arch", arch) if arch else ()), "-o", fused) == 0
    assert surgeon.verify(original, surgeon.load(fused, arch=arch), (1, 4, 9, 8)).verdict == "equivalent"
