"""RepVGG's block against its paper's equations with plain convolutions, at the start, trained, folded and loaded."""

from __future__ import annotations

import pytest
import torch
from helpers import check_folds, relative, shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks.repvgg import RepVGG, RepVGGOptions
from surgeon.conv.spec import ConvSpec

GEOMETRIES = {
    "as in the paper": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "in groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 6},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "without padding": {"kernel_size": (3, 5), "padding": 0},
    "too much padding": {"kernel_size": 3, "padding": 3},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular"},
}
PUBLISHED = {  # the names of https://github.com/DingXiaoH/RepVGG
    f"{branch}{name}"
    for branch in ("rbr_dense.bn.", "rbr_1x1.bn.", "rbr_identity.")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
} | {"rbr_dense.conv.weight", "rbr_1x1.conv.weight"}


def block_of(conv: nn.Conv2d, norm: nn.Module | None = None, **options: object) -> RepVGG:
    generator = torch.Generator().manual_seed(0)
    return RepVGG.from_conv(conv, RepVGGOptions.model_validate(options), norm=norm, generator=generator)


def normed(x: Tensor, norm: nn.Module, *, training: bool = False) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, training, 0.1, norm.eps)


def by_the_paper(block: RepVGG, x: Tensor, *, training: bool = False) -> Tensor:
    """bn(F_k∗x) + bn(F_1∗x) + bn(x), where the 1×1 kernel is a k×k one with one tap, on a map that was padded first."""
    spec, part = block.spec, block.get_submodule
    top, bottom, left, right = spec.pads
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode)
    wide = block.get_parameter("rbr_dense.conv.weight")
    centre = torch.zeros_like(wide)
    centre[:, :, spec.kernel[0] // 2, spec.kernel[1] // 2] = block.get_parameter("rbr_1x1.conv.weight")[:, :, 0, 0]
    how = (None, spec.stride, 0, spec.dilation, spec.groups)
    y = normed(F.conv2d(padded, wide, *how), part("rbr_dense.bn"), training=training)
    y = y + normed(F.conv2d(padded, centre, *how), part("rbr_1x1.bn"), training=training)
    return y if block.rbr_identity is None else y + normed(x, block.rbr_identity, training=training)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_it_is_what_the_paper_says_and_folds_to_one_conv(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, **GEOMETRIES[name]).double()
    block = shake_(block_of(conv, init="scratch")).eval()
    check_folds(block, conv, lambda x: by_the_paper(block, x))
    noise = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    block.train()
    assert relative(block(noise), by_the_paper(block, noise, training=True)) < 1e-12


def test_the_identity_is_there_where_pixels_and_channels_stay() -> None:
    has = {name: block_of(nn.Conv2d(6, 6, **how)).rbr_identity is not None for name, how in GEOMETRIES.items()}
    gone = {"stride 2", "without padding", "too much padding"}
    assert has == {name: name not in gone for name in GEOMETRIES}
    assert block_of(nn.Conv2d(6, 4, 3, padding=1)).rbr_identity is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("init", ["takeover", "split"])
def test_it_starts_as_what_it_replaces(init: str, training: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 6, 3, padding=1).double(), shake_(nn.BatchNorm2d(6)).double()
    x = torch.randn(4, 6, 9, 8, dtype=torch.float64)
    block = block_of(conv, norm, init=init).train(training)
    apart = relative(block(x), nn.Sequential(conv, norm).train(training)(x))
    assert apart < 1e-12 if init == "takeover" or not training else apart > 1e-6


def test_published_checkpoints_load_and_those_of_timm() -> None:
    block = shake_(block_of(nn.Conv2d(4, 4, 3, padding=1, bias=False)))
    state = block.state_dict()
    assert set(state) == PUBLISHED
    names = {"rbr_dense": "conv_kxk", "rbr_1x1": "conv_1x1", "rbr_identity": "identity"}
    theirs = {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in state.items()}
    for given in (state, theirs):
        other = block_of(nn.Conv2d(4, 4, 3, padding=1, bias=False))
        other.load_state_dict(given)
        x = torch.randn(2, 4, 7, 7)
        assert torch.equal(other.eval()(x), block.eval()(x))


def test_a_tap_that_is_off_is_caught() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    converted = shake_(surgeon.convert(model, "repvgg", (1, 3, 9, 9)))
    folded = surgeon.fuse(converted, (1, 3, 9, 9))
    assert surgeon.verify(model, surgeon.convert(model, "repvgg", (1, 3, 9, 9)), (1, 3, 9, 9)).equivalent
    assert surgeon.verify(converted, folded, (1, 3, 9, 9)).equivalent
    with torch.no_grad():
        folded[0].weight[3, 1, 0, 2] += 1e-6
    assert not surgeon.verify(converted, folded, (1, 3, 9, 9)).equivalent


@pytest.mark.parametrize(("kernel", "why"), [((1, 1), "1x1 kernel"), ((2, 3), "2 is even")])
def test_other_kernels_are_refused(kernel: tuple[int, int], why: str) -> None:
    assert why in str(RepVGG.refusal(ConvSpec(4, 4, kernel), None, RepVGGOptions()))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("init", ["takeover", "split"])
def test_it_is_compiled_by_torchscript(init: str) -> None:
    block = block_of(nn.Conv2d(4, 4, 3, padding=1), init=init).eval()
    x = torch.randn(1, 4, 7, 7)
    scripted = torch.jit.script(nn.Sequential(block, nn.ReLU()))
    assert relative(scripted(x), F.relu(block(x))) < 1e-6
