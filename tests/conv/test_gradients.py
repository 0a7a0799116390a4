"""Gradients of kernels by taps, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from torch import Tensor
from torch.nn import functional as F

from surgeon.conv import gradients
from surgeon.conv.gradients import Moves

EXACT = 1e-13
MOVES = [
    ((3, 3), Moves((1, 1), (1, 1), (1, 1), 1), (5, 6)),
    ((3, 1), Moves((1, 1), (1, 0), (1, 1), 1), (5, 6)),
    ((3, 1), Moves((1, 1), (1, 0), (1, 1), 1), (1, 4)),
    ((5, 1), Moves((1, 1), (4, 0), (2, 1), 1), (3, 2)),
    ((3, 1), Moves((1, 1), (0, 0), (1, 1), 1), (6, 3)),
    ((3, 1), Moves((1, 1), (5, 0), (1, 1), 1), (2, 3)),
    ((3, 1), Moves((2, 1), (1, 0), (1, 1), 1), (7, 4)),
    ((3, 1), Moves((1, 1), (1, 2), (1, 1), 1), (4, 4)),
    ((1, 3), Moves((2, 2), (0, 1), (1, 1), 1), (6, 7)),
    ((5, 3), Moves((2, 3), (2, 0), (1, 2), 1), (9, 11)),
]


def given(
    kernel: tuple[int, int], moves: Moves, size: tuple[int, int], c_in: int = 4, c_out: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, c_in, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in // moves.groups, *kernel, dtype=torch.float64)
    y = F.conv2d(x, weight, None, *moves)
    dy = torch.randn(y.shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    return x, weight, dy


def by_torch(x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    F.conv2d(x, kernel, None, *moves).backward(dy)
    assert x.grad is not None
    assert kernel.grad is not None
    return x.grad, kernel.grad


@pytest.mark.parametrize(("kernel", "moves", "size"), MOVES, ids=str)
def test_taps_give_the_gradient_of_the_kernel(kernel: tuple[int, int], moves: Moves, size: tuple[int, int]) -> None:
    x, weight, dy = given(kernel, moves, size)
    found = gradients.of_kernel_by_taps(x, weight, dy, moves)
    assert found.shape == weight.shape
    assert relative(found, by_torch(x, weight, dy, moves)[1]) <= EXACT


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_both_gradients_are_torchs_in_whichever_way(
    wanted: tuple[bool, bool], groups: int, memory_format: torch.memory_format
) -> None:
    moves = Moves((1, 1), (1, 0), (1, 1), groups)
    x, weight, dy = (t.contiguous(memory_format=memory_format) for t in given((3, 1), moves, (5, 6)))
    found = gradients.both(x, weight, dy, moves, wanted)
    for one, other, is_wanted in zip(found, by_torch(x, weight, dy, moves), wanted, strict=True):
        assert (one is not None) == is_wanted
        if one is not None:
            assert relative(one, other) <= EXACT


def test_taps_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    own = gradients.of_kernel_by_taps

    def watched(x: Tensor, kernel: Tensor, dy: Tensor, moves: Moves) -> Tensor:
        seen.append(tuple(kernel.shape[2:]))
        return own(x, kernel, dy, moves)

    monkeypatch.setattr(gradients, "of_kernel_by_taps", watched)
    for kernel, padding in (((3, 1), (1, 0)), ((1, 3), (0, 1)), ((3, 3), (1, 1))):
        moves = Moves((1, 1), padding, (1, 1), 1)
        gradients.both(*given(kernel, moves, (5, 6)), moves, (True, True))
        gradients.both(*given(kernel, moves, (2, 2), c_in=96, c_out=96), moves, (True, True))
    assert seen == [(3, 1), (3, 1), (1, 3), (3, 3)]
