"""A sum of scaled kernels and its gradients, against the same sum written with slices, tap by tap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.conv import scaled_sum as sums

WINDOWS = [(0, 2, 3, 1), (1, 0, 1, 5), (1, 2, 1, 1), (0, 0, 3, 5)]  # two strips, the identity, one tap for all
Given = tuple[Tensor, Tensor, list[Tensor | None]]


def given(groups: int, channels: int = 4, *, channels_last: bool = False) -> Given:
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers.to(memory_format=order) if len(shape) == 4 else numbers).requires_grad_()

    width = channels // groups
    parts = [drawn(channels, width, 3, 1), drawn(channels, width, 1, 5), None, drawn(channels, width, 1, 1)]
    return drawn(5, channels), drawn(channels, width, 3, 5), parts


def by_hand(scale: Tensor, weight: Tensor, parts: list[Tensor | None]) -> Tensor:
    rows = []
    for o in range(len(weight)):
        row = scale[0, o] * weight[o]
        for number, (part, (top, left, height, width)) in enumerate(zip(parts, WINDOWS, strict=True), start=1):
            own = torch.zeros_like(row)
            channels = weight.shape[1]
            taps = torch.eye(channels, dtype=row.dtype)[o % channels, :, None, None] if part is None else part[o]
            own[:, top : top + height, left : left + width] = taps
            row = row + scale[number, o] * own
        rows.append(row)
    return torch.stack(rows)


def trained(scale: Tensor, weight: Tensor, parts: list[Tensor | None]) -> list[Tensor]:
    return [scale, weight, *(part for part in parts if part is not None)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("way", [sums.scaled_sum, sums.added_up])
def test_it_is_the_sum_with_its_gradients(way: Any, groups: int, channels_last: bool) -> None:
    made = given(groups, channels_last=channels_last)
    kernel, expected = way(*made, WINDOWS), by_hand(*made)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-14)
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, right = (torch.autograd.grad(one, trained(*made), noise) for one in (kernel, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_the_order_in_memory_stays() -> None:
    scale, weight, parts = given(1, channels_last=True)
    kernel = sums.scaled_sum(scale, weight, parts, WINDOWS)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.autograd.grad(kernel.square().sum(), weight)[0]
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap alone
def test_gradients_have_gradients_and_functions_of_torch_go_through() -> None:
    scale, weight, parts = given(2)
    fixed = [part.detach() if part is not None else None for part in parts]
    assert torch.autograd.gradgradcheck(lambda s, w: sums.scaled_sum(s, w, fixed, WINDOWS), (scale, weight))
    several = torch.vmap(lambda s: sums.scaled_sum(s, weight, parts, WINDOWS))(torch.stack([scale, 2 * scale]))
    torch.testing.assert_close(several[1], 2 * several[0])
    slope = torch.func.grad(lambda s: sums.scaled_sum(s, weight, parts, WINDOWS).sum())(scale)
    assert torch.equal(slope[0], weight.sum((1, 2, 3)))


def test_what_is_not_trained_gets_no_gradient() -> None:
    scale, weight, parts = given(1)
    weight.requires_grad_(False)
    kernel = sums.scaled_sum(scale, weight, parts, WINDOWS)
    kernel.sum().backward()
    assert weight.grad is None
    assert scale.grad is not None


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_two_convs_in_a_row(groups: int) -> None:
    torch.manual_seed(0)
    first = torch.randn(8, 4 // groups, 1, 1, dtype=torch.float64, requires_grad=True)
    second = torch.randn(12, 8 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    kernel = sums.in_a_row(first, second, groups)
    made, expected = conv(x, kernel, groups=groups), conv(conv(x, first, groups=groups), second, groups=groups)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    noise = torch.randn_like(made)
    found, right = (torch.autograd.grad(one, (first, second), noise) for one in (made, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_autocast_does_not_round_what_is_summed() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 4, 1, 1), torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = sums.in_a_row(first, second, 1)
    assert torch.equal(kernel, sums.in_a_row(first, second, 1))
