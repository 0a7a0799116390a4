"""Sums and sequences of convs are one conv, or are refused: against running them one by one; impulses at borders."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.conv.affine import Affine, side_by_side
from surgeon.conv.axis import Axis, NotOneConvError
from surgeon.conv.kernels import Norm
from surgeon.conv.spec import Pads

SIZES = ((9, 8), (7, 11), (12, 12))
Runs = Callable[[Tensor], Tensor]


@st.composite
def convs(draw: st.DrawFn, c_in: int, c_out: int, *, stride: int | None = None) -> nn.Conv2d:
    """Draw a conv, often with a bias, padding, dilation and groups."""
    groups = draw(st.sampled_from([g for g in (1, 2, c_in) if c_in % g == c_out % g == 0]))
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    step = stride or draw(st.sampled_from((1, 1, 2)))
    conv = nn.Conv2d(
        c_in,
        c_out,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        stride=step,
        padding=draw(pair),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return conv.double()


@torch.no_grad()
def apart(found: Affine, runs: Runs, channels: int) -> float:
    """Say how far a result is from running the parts, on maps of noise and on an impulse at every pixel."""
    worst = 0.0
    for size in SIZES:
        noise = torch.randn(2, channels, *size, dtype=torch.float64)
        impulses = torch.eye(size[0] * size[1], dtype=torch.float64).view(-1, 1, *size).expand(-1, channels, -1, -1)
        for x in (noise, impulses):
            try:
                expected = runs(x)
            except RuntimeError:  # its parts do not fit each other at this size, or it is too small
                continue
            worst = max(worst, float((found(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return worst


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_a_sequence_is_one_conv_or_is_refused(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    middle = data.draw(st.sampled_from((2, 4)))
    first, second = data.draw(convs(4, middle)), data.draw(convs(middle, 4))
    try:
        found = Affine.of_conv(first).then(Affine.of_conv(second))
    except NotOneConvError:
        return
    assert apart(found, lambda x: second(first(x)), 4) < 1e-12


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_a_sum_is_one_conv_or_is_refused(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    stride = data.draw(st.sampled_from((1, 2)))
    parts = [data.draw(convs(4, 4, stride=stride)) for _ in range(data.draw(st.integers(2, 3)))]
    try:
        found = Affine.of_conv(parts[0])
        for part in parts[1:]:
            found = found + Affine.of_conv(part)
    except NotOneConvError:
        return
    assert apart(found, lambda x: sum((part(x) for part in parts), torch.zeros(())), 4) < 1e-12


def test_borders_decide_whether_a_sequence_is_refused() -> None:
    """Every refusal of a sequence is one that a border shows: extended without a care, it is wrong there."""
    point, wide = nn.Conv2d(3, 3, 1, bias=False).double(), nn.Conv2d(3, 3, 3, padding=1).double()
    biased = nn.Conv2d(3, 3, 1).double()
    assert apart(Affine.of_conv(point).then(Affine.of_conv(wide)), lambda x: wide(point(x)), 3) < 1e-12
    for first in (biased, wide):
        with pytest.raises(NotOneConvError, match="zeros that lie between"):
            Affine.of_conv(first).then(Affine.of_conv(wide))
    inner = replace(Affine.of_conv(wide), rows=Axis(3), columns=Axis(3))
    no_pads = nn.Conv2d(3, 3, 3).double()
    no_pads.load_state_dict(wide.state_dict())
    assert apart(Affine.of_conv(wide).then(inner), lambda x: no_pads(wide(x)), 3) < 1e-12
    careless = Affine.of_conv(biased)
    careless = replace(careless, bias=torch.zeros(3, dtype=torch.float64)).then(Affine.of_conv(wide))
    careless = replace(careless, bias=careless.bias + wide.weight.detach().sum((2, 3)) @ biased.bias.detach())
    assert apart(careless, lambda x: wide(biased(x)), 3) > 1e-3


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_mirror_of_pixels_is_the_pixels_of_a_mirror(mode: str) -> None:
    point, wide = nn.Conv2d(3, 4, 1).double(), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode).double()
    assert apart(Affine.of_conv(point).then(Affine.of_conv(wide)), lambda x: wide(point(x)), 3) < 1e-12
    strided = nn.Conv2d(3, 4, 1, stride=2).double()
    with pytest.raises(NotOneConvError, match=mode):
        Affine.of_conv(strided).then(Affine.of_conv(wide))
    square = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode).double()
    beside = nn.Conv2d(3, 3, 1).double()
    found = Affine.of_conv(square) + Affine.of_conv(beside)
    assert apart(found, lambda x: square(x) + beside(x), 3) < 1e-12
    with pytest.raises(NotOneConvError, match="modes"):
        Affine.of_conv(square) + Affine.of_conv(nn.Conv2d(3, 3, 3, padding=1).double())


def test_what_is_not_a_conv_is_one_too() -> None:
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, groups=2).double(), nn.BatchNorm2d(4).double().eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            assert tensor is not None
            tensor.copy_(torch.randn(4))
        assert norm.running_var is not None
        norm.running_var.copy_(torch.rand(4) + 0.5)
    pool = Affine.mean(4, Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 1, 1))
    order = [3, 0, 1, 2]
    found = Affine.of_conv(conv).then(Affine.norm(Norm.of(norm))) - Affine.identity(4).scaled(0.5) + pool
    assert found.groups == 2

    def runs(x: Tensor) -> Tensor:
        return norm(conv(x)) - 0.5 * x + F.avg_pool2d(x, 3, 1, 1)

    assert apart(found, runs, 4) < 1e-12
    assert apart(found.then(Affine.take(4, order)), lambda x: runs(x)[:, order], 4) < 1e-12
    both = side_by_side([found, Affine.take(4, order)])
    assert apart(both, lambda x: torch.cat([runs(x), x[:, order]], 1), 4) < 1e-12


def test_padding_and_cropping_are_part_of_it() -> None:
    conv = nn.Conv2d(3, 3, 3, dilation=2).double()
    for pads in itertools.product((-1, 0, 2), repeat=4):
        found = Affine.pad(3, Pads(*pads)).then(Affine.of_conv(conv))
        top, bottom, left, right = pads
        assert apart(found, lambda x, sides=(left, right, top, bottom): conv(F.pad(x, sides)), 3) < 1e-12


def test_different_sizes_are_refused_and_equal_ones_are_not() -> None:
    square, point = nn.Conv2d(3, 3, 3, stride=2, padding=1).double(), nn.Conv2d(3, 3, 1, stride=2).double()
    found = Affine.of_conv(square) + Affine.of_conv(point)
    assert apart(found, lambda x: square(x) + point(x), 3) < 1e-12
    with pytest.raises(NotOneConvError, match="sizes"):
        Affine.of_conv(nn.Conv2d(3, 3, 3)) + Affine.of_conv(nn.Conv2d(3, 3, 1))
    with pytest.raises(NotOneConvError, match="strides 1 and 2"):
        Affine.of_conv(nn.Conv2d(3, 3, 1)) + Affine.of_conv(point)
    pool = Affine.mean(3, Axis(2, 2), Axis(2, 2))  # fits an even map alone
    assert apart(pool + Affine.of_conv(point), lambda x: F.avg_pool2d(x, 2) + point(x), 3) < 1e-12


def test_multiply_adds_are_those_of_the_convs_as_written() -> None:
    first, second = nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 3, stride=2)
    found = Affine.of_conv(first).then(Affine.of_conv(second))
    assert found.macs == 16 * 4 + 2 * 8 * 9
    assert found.kernel.numel() == 8 * 8 * 9
