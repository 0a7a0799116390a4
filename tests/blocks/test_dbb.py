"""The Diverse Branch Block against its paper's equations with plain functions, started, trained, folded, loaded."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import check_folds, relative, shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks.dbb import DiverseBranch, DiverseBranchOptions
from surgeon.conv.spec import ConvSpec

GEOMETRIES = {
    "as in the paper": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "in groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 6},
    "rectangular": {"kernel_size": (3, 5), "padding": (0, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The names of https://github.com/DingXiaoH/DiverseBranchBlock, of a dense and of a depthwise block.
DENSE = {
    *("dbb_origin.conv.weight", "dbb_avg.conv.weight", "dbb_1x1.conv.weight"),
    *("dbb_1x1_kxk.idconv1.weight", "dbb_1x1_kxk.conv2.weight"),
    *(f"dbb_origin.bn.{name}" for name in NORM),
    *(f"dbb_avg.bn.bn.{name}" for name in NORM),
    *(f"dbb_avg.avgbn.{name}" for name in NORM),
    *(f"dbb_1x1.bn.{name}" for name in NORM),
    *(f"dbb_1x1_kxk.bn1.bn.{name}" for name in NORM),
    *(f"dbb_1x1_kxk.bn2.{name}" for name in NORM),
}
DEPTHWISE = {key for key in DENSE if not key.startswith(("dbb_1x1.", "dbb_avg.conv", "dbb_avg.bn."))}
DEPTHWISE = {key.replace("idconv1", "conv1") for key in DEPTHWISE}


def block_of(conv: nn.Conv2d, norm: nn.Module | None = None, **options: object) -> DiverseBranch:
    generator = torch.Generator().manual_seed(0)
    return DiverseBranch.from_conv(conv, DiverseBranchOptions.model_validate(options), norm=norm, generator=generator)


def by_the_paper(block: DiverseBranch, x: Tensor, *, training: bool = False, is_careless: bool = False) -> Tensor:
    """The four branches; around a map between two steps lies what its norm makes of 0 by its running statistics."""
    spec, state = block.spec, block.state_dict()
    (ph, _, pw, _), how = spec.pads, {"stride": spec.stride, "groups": spec.groups}

    def normed(y: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (state[f"{name}.{one}"] for one in NORM[:4])
        return F.batch_norm(y, *((None, None) if training else (mean, var)), weight, bias, training, 0.1, 1e-5)

    def around(y: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (state[f"{name}.{one}"] for one in NORM[:4])
        framed = (bias - mean * weight / (var + 1e-5).sqrt())[None, :, None, None] * (not is_careless)
        framed = framed.repeat(len(y), 1, y.shape[2] + 2 * ph, y.shape[3] + 2 * pw)
        framed[:, :, ph : ph + y.shape[2], pw : pw + y.shape[3]] = normed(y, name)
        return framed

    origin = F.conv2d(x, state["dbb_origin.conv.weight"], padding=(ph, pw), **how)
    out = normed(origin, "dbb_origin.bn")
    if "dbb_1x1_kxk.idconv1.weight" in state:
        first, width = state["dbb_1x1_kxk.idconv1.weight"].clone(), spec.c_in // spec.groups
        for channel in range(spec.c_in):
            first[channel, channel % width] += 1
    else:
        first = state["dbb_1x1_kxk.conv1.weight"]
    between = around(F.conv2d(x, first, groups=spec.groups), "dbb_1x1_kxk.bn1.bn")
    out = out + normed(F.conv2d(between, state["dbb_1x1_kxk.conv2.weight"], **how), "dbb_1x1_kxk.bn2")
    if "dbb_1x1.conv.weight" not in state:
        mean = F.avg_pool2d(x, spec.kernel, spec.stride, (ph, pw))
        return out + normed(mean, "dbb_avg.avgbn")
    before = around(F.conv2d(x, state["dbb_avg.conv.weight"], groups=spec.groups), "dbb_avg.bn.bn")
    out = out + normed(F.avg_pool2d(before, spec.kernel, spec.stride), "dbb_avg.avgbn")
    rows, columns = spec.kernel[0] // 2 - ph, spec.kernel[1] // 2 - pw  # the centre tap of the first pixel
    seen = x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]
    return out + normed(F.conv2d(seen, state["dbb_1x1.conv.weight"], **how), "dbb_1x1.bn")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_it_is_what_the_paper_says_and_folds_to_one_conv(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, **GEOMETRIES[name]).double()
    block = shake_(block_of(conv, init="scratch")).eval()
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            if "idconv1" in key:
                parameter.normal_(std=0.3)
    check_folds(block, conv, lambda x: by_the_paper(block, x))
    noise = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    block.train()
    found = block(noise)  # which moves the running statistics that the border is made of
    assert relative(found, by_the_paper(block, noise, training=True)) < 1e-12


def test_zeros_between_the_convs_would_show_at_the_border_alone() -> None:
    torch.manual_seed(0)
    block = shake_(block_of(nn.Conv2d(6, 6, 3, padding=1).double(), init="scratch")).eval()
    x = torch.randn(1, 6, 9, 8, dtype=torch.float64)
    careless = by_the_paper(block, x, is_careless=True)
    assert relative(block(x), careless) > 1e-3
    assert relative(block(x)[..., 1:-1, 1:-1], careless[..., 1:-1, 1:-1]) < 1e-12


def test_a_split_adds_branches_as_large_as_the_kernel() -> None:
    """An identity beside taps of .01 would leave -1 in the kernel, and its rounding in the sum."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, groups=64)
    with torch.no_grad():
        conv.weight.mul_(0.01)
    block = block_of(conv, init="split").eval()
    assert block.get_parameter("dbb_origin.conv.weight").abs().max() < 0.05
    x = torch.randn(1, 64, 9, 8)
    exact = deepcopy(conv).double()(x.double())
    assert relative(block(x).double(), exact) < 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("init", ["takeover", "split"])
@pytest.mark.parametrize("groups", [1, 6])
def test_it_starts_as_what_it_replaces(init: str, training: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 6, 3, padding=1, groups=groups).double(), shake_(nn.BatchNorm2d(6)).double()
    x = torch.randn(4, 6, 9, 8, dtype=torch.float64)
    block = block_of(conv, norm, init=init).train(training)
    apart = relative(block(x), nn.Sequential(conv, norm).train(training)(x))
    assert apart < 1e-12 if init == "takeover" or not training else apart > 1e-6


def test_published_checkpoints_load() -> None:
    dense, depthwise = (block_of(nn.Conv2d(4, 4, 3, padding=1, groups=groups)) for groups in (1, 4))
    assert set(dense.state_dict()) == DENSE
    assert set(depthwise.state_dict()) == DEPTHWISE
    assert depthwise.state_dict()["dbb_1x1_kxk.conv1.weight"].shape == (8, 1, 1, 1)  # twice the channels inside
    wide = block_of(nn.Conv2d(4, 4, 3, padding=1), expansion=2)
    assert "dbb_1x1_kxk.conv1.weight" in wide.state_dict()


def test_a_tap_that_is_off_is_caught() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    converted = surgeon.convert(model, "dbb", (1, 3, 9, 9))
    assert surgeon.verify(model, converted, (1, 3, 9, 9)).equivalent
    shake_(converted)
    folded = surgeon.fuse(converted, (1, 3, 9, 9))
    assert surgeon.verify(converted, folded, (1, 3, 9, 9)).equivalent
    with torch.no_grad():
        folded[0].weight[3, 1, 0, 2] += 1e-6
    assert not surgeon.verify(converted, folded, (1, 3, 9, 9)).equivalent


REFUSED = {
    "1x1": ({"kernel": (1, 1)}, "1x1 kernel"),
    "even": ({"kernel": (4, 3)}, "4 is even"),
    "dilated": ({"kernel": (3, 3), "dilation": (2, 2)}, "cannot be dilated"),
    "mirrored": ({"kernel": (3, 3), "padding_mode": "reflect"}, "padding mode reflect"),
    "padded too much": ({"kernel": (3, 3), "padding": (2, 2)}, "more than half"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_convs_are_refused(name: str) -> None:
    fields, why = REFUSED[name]
    assert why in str(DiverseBranch.refusal(ConvSpec(4, 4, **fields), None, DiverseBranchOptions()))


def test_scales_of_a_split_without_a_norm_are_rounded_once() -> None:
    """The scale that undoes the eps of the first norm is no number of float32, and others are computed from it."""
    for seed in range(12):
        torch.manual_seed(seed)
        narrow = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        options = DiverseBranchOptions(init="split")
        one, two = (
            DiverseBranch.from_conv(conv, options, norm=None, generator=torch.Generator().manual_seed(0))
            for conv in (narrow, deepcopy(narrow).double())
        )
        assert torch.equal(one.get_parameter("dbb_avg.avgbn.weight"), two.get_parameter("dbb_avg.avgbn.weight").float())
