"""Operators are recovered right, for every class of border: judged by whole matrices, made without any of that code."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks import Foldable, registry
from surgeon.conv.spec import ConvSpec
from surgeon.models.call import Inputs
from surgeon.proof import every_input, linearity, operators
from surgeon.proof.alike import unlike
from surgeon.proof.calls import evaluating
from surgeon.proof.distance import as_double
from surgeon.proof.linearity import NotLinearError

CPU = torch.device("cpu")
BLOCKS = ("acblock", "repvgg", "dbb", "hetconv", "norm", "acblock online", "repvgg online", "dbb online")
MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


def drawn(seed: int) -> tuple[str, ConvSpec]:
    """Draw what is folded and a geometry that it takes."""
    chance = random.Random(seed)
    while True:
        what = BLOCKS[seed % len(BLOCKS)]
        kernel = (chance.randint(1, 7), chance.randint(1, 7))
        dilation = (chance.randint(1, 3), chance.randint(1, 3))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        groups, mode = chance.choice((1, 1, 2, 4)), chance.choice(MODES)
        stride = (chance.randint(1, 3), chance.randint(1, 3))
        padding: Any = chance.choice(("same", (chance.randint(0, kernel[0]), chance.randint(0, kernel[1]))))
        if padding == "same" and stride != (1, 1):
            padding = (reach[0] // 2, 0)
        if max(reach) > (6 if mode == "zeros" else 2):
            continue
        spec = ConvSpec(
            *(4, 4, kernel), stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode
        )
        if what == "norm" or registry()[what.split()[0]].refusal(spec, None, options(what)) is None:
            return what, spec


def options(what: str) -> Any:
    kind = registry()[what.split()[0]].Options
    return kind.model_validate({"form": "online"} if "online" in what else {"p": 2} if what == "hetconv" else {})


def pair_of(what: str, spec: ConvSpec, seed: int = 0) -> tuple[nn.Module, nn.Conv2d]:
    """Make a block, or a conv and its norm, and the conv that it folds to, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conv = spec.build_with(torch.randn(spec.weight_shape), torch.randn(spec.c_out), like=torch.zeros(1))
        if what == "norm":
            whole = nn.Sequential(conv, nn.BatchNorm2d(spec.c_out))
            shake_(whole)
            whole.double().eval()
            norm: Any = whole[1]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = norm.bias + (conv.bias - norm.running_mean) * scale
            return whole, spec.build_with(conv.weight * scale.view(-1, 1, 1, 1), bias, like=conv.weight).eval()
        kind = registry()[what.split()[0]]
        block = kind.from_conv(conv, options(what), norm=None, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            shake_(block)
            for parameter in block.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert isinstance(block, Foldable)
    block.double().eval()
    return block, block.fold().eval()


def matrices(module: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Give what a module makes of nothing and of every impulse, called as it is; None for a map that it refuses."""
    h, w = size
    with torch.no_grad():
        try:
            offset = module(torch.zeros(1, channels, h, w, dtype=torch.float64))
            whole = module(torch.eye(channels * h * w, dtype=torch.float64).view(-1, channels, h, w)) - offset
        except (RuntimeError, ValueError):
            return None
    return offset, whole


def furthest(one: nn.Module, other: nn.Module, channels: int, sizes: Iterator[tuple[int, int]]) -> float:
    """Give the largest difference of any entry of the matrices of two modules, relative to the largest entry."""
    found = 0.0
    for size in sizes:
        ours, theirs = matrices(one, channels, size), matrices(other, channels, size)
        assert (ours is None) is (theirs is None)
        if ours is not None and theirs is not None:
            scale = max(float(t.abs().max()) for t in theirs)
            found = max([found, *(float((a - b).abs().max()) / scale for a, b in zip(ours, theirs, strict=True))])
    return found


def few_sizes(spec: ConvSpec) -> Iterator[tuple[int, int]]:
    """Give sizes from a small one to one that holds every border, not the ones that the code takes."""
    most = [d * (k - 1) + s + 1 for d, k, s in zip(spec.dilation, spec.kernel, spec.stride, strict=True)]
    return itertools.chain([(most[0], most[1]), (most[0] + 1, most[1] + 2)], [(max(1, most[0] // 2), most[1])])


class AtOneCorner(nn.Module):
    """A conv of which one tap is off for the pixel in one corner of the map, and for no other."""

    def __init__(self, conv: nn.Conv2d, last: tuple[bool, bool], off: float, tap: int = 1) -> None:
        super().__init__()
        self.conv, self.last = conv, last
        self.tap = (
            ConvSpec.of(conv).change(bias=False).build_with(torch.zeros_like(conv.weight), None, like=conv.weight)
        )
        with torch.no_grad():
            self.tap.weight[-1, 0, tap, tap] = off
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (slice(-1, None) if one else slice(0, 1) for one in self.last)
        down, right = x.shape[2] - 1, x.shape[3] - 1
        top, left = down * self.last[0], right * self.last[1]
        corner = F.pad(x[:, :, rows, columns], (left, right - left, top, down - top))
        found: Tensor = self.conv(x) + self.tap(corner)
        return found


def compared(one: nn.Module, other: nn.Module, channels: int = 4) -> operators.Agreement:
    return operators.compare(one, other, channels, CPU)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("seed", range(208))
def test_a_right_fold_has_the_same_operator_and_one_wrong_tap_another(seed: int) -> None:
    what, spec = drawn(seed)
    block, conv = pair_of(what, spec, seed)
    assert furthest(block, conv, 4, few_sizes(spec)) < 1e-12
    found = compared(block, conv)
    assert found.holds
    assert found.found < 1e-12
    with torch.no_grad():
        conv.weight[-1, -1, -1, -1] += 1e-6 * conv.weight[-1].abs().max()
    wrong = compared(block, conv)
    assert not wrong.holds
    assert 1e-10 < wrong.found < 1.1e-6  # of the largest number of the filter, which may be its bias


@pytest.mark.parametrize("last", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_tap_that_one_corner_alone_sees_is_found(last: tuple[bool, bool], stride: int) -> None:
    block, conv = pair_of("acblock", ConvSpec(2, 2, (3, 3), stride=(stride, stride), padding=(1, 1)))
    assert not compared(block, AtOneCorner(conv, last, 1e-8), 2).holds
    if stride == 1:
        assert compared(block, AtOneCorner(conv, last, 0.0), 2).holds


def test_a_tap_that_is_seen_at_one_phase_of_the_stride_alone_is_found() -> None:
    """The last tap of a 3×3 kernel at stride 2 sees the last pixel of even maps, and not of odd ones."""
    block, conv = pair_of("acblock", ConvSpec(2, 2, (3, 3), stride=(2, 2), padding=(1, 1)))
    assert not compared(block, AtOneCorner(conv, (True, True), 1e-8, tap=2), 2).holds


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_another_padding_mode_is_found(mode: str) -> None:
    block, conv = pair_of("acblock", ConvSpec(4, 4, (3, 3), padding=(1, 1)))
    other = ConvSpec.of(conv).change(padding_mode=mode).build_with(conv.weight, conv.bias, like=conv.weight)
    assert not compared(block, other.eval()).holds


@pytest.mark.parametrize("strip", ["ver_conv", "hor_conv"])
def test_a_strip_that_is_one_off_is_found(strip: str) -> None:
    block, conv = pair_of("acblock", ConvSpec(4, 4, (3, 3), padding=(1, 1)))
    moved: Any = block.get_submodule(strip)
    axis = 0 if strip == "ver_conv" else 1
    moved.padding = tuple(0 for _ in range(2))
    pads = [0, 0, 2, 0] if axis == 0 else [2, 0, 0, 0]  # both at the start, in place of one at each border
    block.set_submodule(strip, nn.Sequential(nn.ZeroPad2d((pads[0], pads[1], pads[2], pads[3])), moved).eval())
    assert not compared(block, conv).holds


def test_what_differs_only_where_a_stride_leaves_off_is_found() -> None:
    """An even map at stride 2 has its last row seen by the wider one alone."""
    conv = nn.Conv2d(4, 4, 3, stride=2, bias=False).double().eval()
    wider = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv).eval()
    assert compared(wider, conv).found == float("inf")


def test_numbers_that_cancel_condemn_no_right_fold() -> None:
    for var, weight in ((1e-12, 1e4), (1e-30, 1e-20), (4e8, 1e-3)):
        block, _ = pair_of("acblock", ConvSpec(4, 4, (3, 3), padding=(1, 1)))
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.fill_(var)
                nn.init.constant_(module.weight, weight)
        kernels: Any = block
        with torch.no_grad():  # the strips take away what the square gives, to the last digits
            kernels.square_conv.weight[:, :, :, 1:2] = -kernels.ver_conv.weight * (1 + 1e-14)
        kernels.ver_bn.load_state_dict(kernels.square_bn.state_dict())
        assert isinstance(block, Foldable)
        assert compared(block, block.fold().eval()).holds


@pytest.mark.parametrize("inside", [nn.ReLU(), nn.MaxPool2d(1), nn.Softmax(1), nn.Hardtanh(-1e9, 1e9)])
def test_of_what_is_not_affine_nothing_is_said(inside: nn.Module) -> None:
    conv = nn.Conv2d(4, 4, 3).double().eval()
    with pytest.raises(NotLinearError, match="is no step"):
        compared(nn.Sequential(conv, inside).eval(), conv)


def test_a_product_of_two_maps_and_a_norm_of_the_batch_are_not_affine() -> None:
    x = torch.zeros(2, 4, 5, 5, dtype=torch.float64)
    norm = nn.BatchNorm2d(4).double()
    for run in (lambda y: y * y, lambda y: norm.train()(y), lambda y: y.float(), lambda y: y / (y + 1)):
        with pytest.raises(NotLinearError):
            linearity.steps_of(run, x)
    assert linearity.steps_of(norm.eval(), x)[1].reach == (0, 0)


class Net(nn.Module):
    """Two convs with norms, a shortcut, and something behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        found: Tensor = self.head(self.act(y).mean((2, 3)))
        return found


class Branches(nn.Module):
    """Branches that are summed, as RepVGG has them, in code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.same, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.wide(x) + self.point(x) + self.same(x))
        return found


def converted() -> nn.Module:
    model = surgeon.convert(Net().eval(), "acnet", example=(1, 3, 12, 12))
    shake_(model)
    return model


def proof_of(a: nn.Module, b: nn.Module) -> every_input.EveryInput | None:
    first, second = (evaluating(model, as_double) for model in (a, b))
    return every_input.prove(
        first, second, unlike(first, second, with_tensors=True), Inputs((torch.zeros(1, 3, 12, 12),))
    )


def test_verify_says_that_a_network_is_equal_for_every_input() -> None:
    a = converted()
    report = surgeon.verify(a, surgeon.fuse(a), (1, 3, 12, 12), prove=True)
    check = next(one for one in report.checks if one.name == "operators")
    assert report.equivalent
    assert report.for_every_input
    assert check.passed
    assert "2 of 2 folded parts are equal for every input" in check.says
    assert any("not only for those that were run" in remark for remark in report.remarks)
    assert report.to_dict()["for_every_input"] is True


def test_without_being_asked_nothing_is_proved() -> None:
    a = converted()
    report = surgeon.verify(a, surgeon.fuse(a), (1, 3, 12, 12))
    assert not report.for_every_input
    assert "operators" not in [one.name for one in report.checks]


def test_conversions_norms_and_branches_are_proved_too() -> None:
    net, branches = Net().eval(), nn.Sequential(Branches(), Branches()).eval()
    shake_(net), shake_(branches)
    pairs = [
        (net, surgeon.convert(net, "acnet", example=(1, 3, 12, 12)), (1, 3, 12, 12)),
        (net, surgeon.fuse(net, norms=True), (1, 3, 12, 12)),
        (branches, surgeon.fuse(branches, branches=True), (1, 4, 12, 12)),
    ]
    for a, b, example in pairs:
        assert surgeon.verify(a, b, example, prove=True).for_every_input


def test_a_fault_in_one_fold_is_named_and_no_other_is() -> None:
    a = converted().double()
    b = surgeon.fuse(a)
    found = proof_of(a, b)
    assert found is not None
    assert found.is_whole
    with torch.no_grad():
        b.get_parameter("conv2.weight")[3, 2, 0, 0] += 1e-9
    wrong = proof_of(a, b)
    assert wrong is not None
    assert not wrong.is_whole
    assert [name for name, one in wrong.parts.items() if not one.holds] == ["conv2"]


@pytest.mark.parametrize("path", ["conv2", "act", "bn2", "conv1.square_conv", ""])
def test_where_there_is_a_hook_nothing_is_said(path: str) -> None:
    a = converted().double()
    b = surgeon.fuse(a)
    a.get_submodule(path).register_forward_hook(lambda module, given, out: out)
    found = proof_of(a, b)
    assert found is None or not found.is_whole
    assert found is None or path.partition(".")[0] not in found.parts


def test_a_forward_of_its_own_is_not_what_a_class_says() -> None:
    a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    shake_(a)
    b = surgeon.fuse(a, norms=True)
    assert (found := proof_of(a, b)) is not None
    assert found.is_whole
    vars(a[0])["forward"] = lambda x: x.clamp(max=1e6)
    assert proof_of(a, b) is None


def test_a_class_that_is_not_known_is_not_taken_for_what_it_is_a_subclass_of() -> None:
    class Clipping(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            found: Tensor = super().forward(input.clamp(max=1e6))
            return found

    model = nn.Sequential(Clipping(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    other.load_state_dict(model.state_dict())
    assert proof_of(model, other) is None


def test_what_is_read_after_it_was_changed_in_place_is_not_what_its_name_says() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            z = self.act(y)
            return z + y  # y is z by now

    a = Reads().double().eval()
    shake_(a)
    found = proof_of(a, surgeon.fuse(a, norms=True))
    assert found is None or not found.is_whole


def test_without_a_history_the_report_says_that_nothing_was_proved() -> None:
    a = Net().eval()
    report = surgeon.verify(a, Net().eval(), (1, 3, 12, 12), prove=True)
    assert not report.for_every_input
    assert any("nothing was proved for every input" in remark for remark in report.remarks)
