"""Arithmetic on kernels, against F.conv2d and F.batch_norm."""

from __future__ import annotations

import pytest
import torch
from helpers import relative, shake_
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.conv import kernels
from surgeon.conv.kernels import Norm
from surgeon.conv.spec import ConvSpec

EXACT = 1e-13


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def norm_of(channels: int, **options: object) -> nn.BatchNorm2d:
    return shake_(nn.BatchNorm2d(channels, dtype=torch.float64, **options)).eval()


def normed(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.7])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_fold_bn_is_conv_then_norm(affine: bool, eps: float, groups: int, has_bias: bool) -> None:
    x, kernel, bias = randn(2, 4, 7, 6), randn(6, 4 // groups, 3, 2), randn(6) if has_bias else None
    norm = norm_of(6, affine=affine, eps=eps)
    expected = normed(norm, F.conv2d(x, kernel, bias, groups=groups))
    folded = kernels.fold_bn(kernel, bias, Norm.of(norm))
    assert relative(F.conv2d(x, *folded, groups=groups), expected) <= EXACT
    folded[0].data[5, 0, 2, 1] += 1e-6
    assert relative(F.conv2d(x, *folded, groups=groups), expected) > 1e3 * EXACT


def test_fold_bn_of_a_norm_with_weight_but_no_bias() -> None:
    x, kernel, norm = randn(2, 4, 5, 5), randn(3, 4, 3, 3), norm_of(3)
    norm.bias = None  # as BatchNorm2d(bias=False) leaves it, which torch 2.11 does not know
    folded = kernels.fold_bn(kernel, None, Norm.of(norm))
    assert relative(F.conv2d(x, *folded), normed(norm, F.conv2d(x, kernel))) <= EXACT


def test_fold_bn_changes_neither_kernel_nor_norm() -> None:
    kernel, bias, norm = randn(3, 2, 3, 3), randn(3), norm_of(3)
    given = [kernel, bias, *norm.state_dict().values()]
    before = [tensor.clone() for tensor in given]
    kernels.fold_bn(kernel, bias, Norm.of(norm))
    assert all(map(torch.equal, given, before))


def test_fold_bn_passes_gradients() -> None:
    kernel, norm = randn(3, 2, 3, 3).requires_grad_(), norm_of(3)
    folded, bias = kernels.fold_bn(kernel, None, Norm.of(norm))
    (folded.sum() + bias.sum()).backward()
    assert all(tensor.grad is not None for tensor in (kernel, norm.weight, norm.bias))


def test_norm_double_takes_each_number_as_stored() -> None:
    norm = shake_(nn.BatchNorm2d(3))
    double = Norm.of(norm).double()
    pairs = zip(
        (double.mean, double.var, double.weight, double.bias),
        (norm.running_mean, norm.running_var, norm.weight, norm.bias),
        strict=True,
    )
    assert all(wide.dtype == torch.float64 and torch.equal(wide, narrow.double()) for wide, narrow in pairs)
    assert double.eps == norm.eps


def test_a_norm_without_statistics_cannot_be_read() -> None:
    with pytest.raises(AssertionError):
        Norm.of(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("large", [(3, 3), (5, 3), (4, 7)])
@pytest.mark.parametrize("small", [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3)])
def test_embed_puts_every_tap_where_it_belongs(large: tuple[int, int], small: tuple[int, int]) -> None:
    strip = randn(2, 3, *small)
    for row in range(large[0] - small[0] + 1):
        for column in range(large[1] - small[1] + 1):
            expected = torch.zeros(2, 3, *large, dtype=torch.float64)
            for i in range(small[0]):
                for j in range(small[1]):
                    expected[:, :, row + i, column + j] = strip[:, :, i, j]
            assert torch.equal(kernels.embed(strip, large, row=row, column=column), expected)


def test_an_embedded_strip_sees_the_pixels_of_its_row() -> None:
    x, strip = randn(1, 2, 9, 8), randn(3, 2, 1, 3)
    wide = F.conv2d(x, kernels.embed(strip, (5, 3), row=3), dilation=2)
    assert relative(wide, F.conv2d(x[:, :, 6:-2], strip, dilation=2)) <= EXACT


PLACED = [ConvSpec(6, 4, (1, 1)), ConvSpec(6, 4, (3, 3), padding=(1, 1), stride=(2, 2))]


@pytest.mark.parametrize("spec", PLACED, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adding_a_convolution_in_place(spec: ConvSpec, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(spec.weight_shape, dtype=torch.float64)
    term = F.conv2d(x, weight, None, spec.stride, spec.padding)
    y = torch.randn_like(term).to(memory_format=memory_format)
    expected = y + term
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            into = y.clone()
            assert kernels.add_convolved_(into, x, weight, spec) is into
            assert relative(into, expected) <= 1e-14


@pytest.mark.parametrize("count", [1, 2, 3])
def test_add_is_the_sum_of_parallel_convs(count: int) -> None:
    x = randn(2, 4, 6, 7)
    branches = [(randn(6, 2, 3, 3), randn(6)) for _ in range(count)]
    expected = sum(F.conv2d(x, kernel, bias, groups=2) for kernel, bias in branches)
    assert isinstance(expected, Tensor)
    kernel, bias = kernels.add(*branches)
    assert relative(F.conv2d(x, kernel, bias, groups=2), expected) <= EXACT
    kernel[0, 0, 0, 0] += 1e-6
    assert relative(F.conv2d(x, kernel, bias, groups=2), expected) > 1e3 * EXACT


def _norm(mean: float, var: float, weight: float, bias: float) -> Norm:
    return Norm(*(torch.tensor([one], dtype=torch.float64) for one in (mean, var, weight, bias)), eps=0.0)


@pytest.mark.parametrize(("weight", "scale"), [(2.0, 2.0), (0.5, 0.5), (0.01, 1.0), (0.0, 1.0), (-0.5, -0.5)])
def test_a_sum_of_normed_convs_is_a_conv_and_a_norm(weight: float, scale: float) -> None:
    """y = Σ s_i(F_i·x − μ_i) + β_i with F = 3, 5, and all variances 1; a scale below 1/16 of the other is not taken."""
    branches = [
        (torch.full((1, 1, 1, 1), one, dtype=torch.float64), _norm(2 * one, 1, w, 7))
        for one, w in ((3, weight), (5, 1))
    ]
    kernel, norm = kernels.keep_bn(branches)
    assert (norm.weight / norm.var.sqrt()).item() == pytest.approx(scale)
    assert kernel.item() == pytest.approx((3 * weight + 5) / scale)
    assert norm.mean.item() == pytest.approx((6 * weight + 10) / scale)
    assert norm.bias.item() == 14
    assert norm.var.item() == pytest.approx((weight**2 + 1) / scale**2)
