"""The scales of branches, and the energy that blocks keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon

EXAMPLE = (1, 4, 16, 16)


def net_of(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
    return surgeon.convert(net, recipe, example=EXAMPLE)


@pytest.mark.parametrize(
    ("recipe", "norms"),
    [
        ("acnet", {"square_conv": "square_bn", "ver_conv": "ver_bn", "hor_conv": "hor_bn"}),
        ("repvgg", {"rbr_dense": "rbr_dense.bn", "rbr_1x1": "rbr_1x1.bn", "rbr_identity": "rbr_identity"}),
        (
            "dbb",
            {
                "dbb_origin": "dbb_origin.bn",
                "dbb_1x1_kxk": "dbb_1x1_kxk.bn2",
                "dbb_avg": "dbb_avg.avgbn",
                "dbb_1x1": "dbb_1x1.bn",
            },
        ),
    ],
)
def test_each_branch_has_the_scale_of_the_norm_at_its_end(recipe: str, norms: dict[str, str]) -> None:
    net = net_of(recipe)
    for i, name in enumerate(norms.values(), start=1):
        norm = net[0].get_submodule(name)
        with torch.no_grad():
            norm.weight.copy_(i * torch.tensor([-1.0, 2.0, 3.0, 6.0]))
            norm.running_var.fill_(4 - norm.eps)
    (layer,) = surgeon.kernels(net).networks[0].scales
    assert [branch.name for branch in layer.branches] == list(norms)
    for i, branch in enumerate(layer.branches, start=1):
        assert (branch.gamma.mean, branch.gamma.least, branch.gamma.median, branch.gamma.most) == (
            *(3.0 * i, 1.0 * i, 2.5 * i, 6.0 * i),
        )
        assert branch.folded.mean == pytest.approx(1.5 * i, rel=1e-12)
        assert branch.folded.lower == pytest.approx(branch.gamma.lower / 2, rel=1e-12)


def test_the_online_form_has_a_scale_for_each_kernel() -> None:
    net = net_of("acnet-online")
    with torch.no_grad():
        net[0].scale.copy_(torch.tensor([[1.0] * 4, [-2.0] * 4, [3.0, 3.0, 5.0, 5.0]]))
    (layer,) = surgeon.kernels(net).networks[0].scales
    found = {branch.name: (branch.gamma.mean, branch.folded.mean) for branch in layer.branches}
    assert found == {"conv_weight": (1.0, 1.0), "ver_weight": (2.0, 2.0), "hor_weight": (4.0, 4.0)}


@pytest.mark.parametrize("recipe", ["hetconv-p4", "octave"])
def test_branches_without_norms_have_no_scales(recipe: str) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    network = surgeon.kernels(surgeon.convert(net, recipe, example=(1, 8, 16, 16))).networks[0]
    assert network.layers[0].kind in recipe
    assert network.scales == ()


def test_the_energy_that_is_kept_is_that_of_the_plan_also_after_folding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    plan = surgeon.plan(net, "hetconv-p4", example=(1, 8, 16, 16))
    net = surgeon.convert(net, plan)
    wanted = {entry.path: entry.kept_energy for entry in plan.convs if entry.swap}
    for made in (net, surgeon.fuse(net)):
        found = surgeon.kernels(made).networks[0].kept
        assert {one.path: one.ways for one in found} == wanted
        assert wanted
        assert all(one.share == one.ways["block"] and one.way == "block" for one in found)
    assert "kept" in str(surgeon.kernels(net))


def test_without_a_history_nothing_is_known_of_what_is_kept() -> None:
    assert surgeon.kernels(nn.Sequential(nn.Conv2d(8, 8, 3))).networks[0].kept == ()
