"""The sum of normed maps and its gradients: kernels and torch's own norm against the equations, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.one_pass import normed_sum
from surgeon.one_pass.normed_sum import Statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 8, 5, 7), (1, 3, 2, 2), (2, 67, 3, 1), (12, 2, 9, 11), (2, 1, 1, 5), (5, 5, 1, 1)]
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_format = pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])


def given(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, *, mean: float = 0.5
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Statistics], Tensor]:
    torch.manual_seed(0)
    c, rest = shape[1], torch.float64 if dtype == torch.float64 else torch.float32

    def draw(size: float) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64) * size + mean * torch.randn(1, c, 1, 1, dtype=torch.float64)
        return drawn.to(DEVICE, dtype).contiguous(memory_format=memory_format)

    def of_channels() -> Tensor:
        return torch.rand(c, dtype=rest).to(DEVICE) + 0.2

    settings = [(0.1, 1e-5), (1.0, 1e-3), (1 / 7, 1e-5)]
    statistics = [Statistics(of_channels(), of_channels(), momentum, eps) for momentum, eps in settings]
    maps = [draw(size) for size in (1, 3, 0.5)]
    return maps, [of_channels() for _ in maps], [of_channels() for _ in maps], statistics, draw(1)


def expected(
    maps: list[Tensor], scales: list[Tensor], shifts: list[Tensor], statistics: list[Statistics], dy: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sum, running statistics and gradients by torch's own autograd, in float64."""
    leaves = [[t.detach().double().requires_grad_() for t in group] for group in (maps, scales, shifts)]
    running = [(one.mean.double(), one.var.double(), one) for one in statistics]
    y = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for z, scale, shift, (mean, var, own) in zip(*leaves, running, strict=True):
        y = y + F.batch_norm(z, mean, var, scale, shift, True, own.momentum, own.eps)
    grads = torch.autograd.grad(y, [t for group in leaves for t in group], dy.double())
    return y.detach(), [mean for mean, _, _ in running] + [var for _, var, _ in running], list(grads)


def check(found: Tensor, wanted: Tensor, size: float, limit: float) -> None:
    assert found.isfinite().all()
    assert (found.double() - wanted).norm().item() <= limit * max(wanted.norm().item(), size)


def run_and_check(case: tuple[list[Tensor], list[Tensor], list[Tensor], list[Statistics], Tensor]) -> None:
    maps, scales, shifts, statistics, dy = case
    y, running, grads = expected(*case)
    made, known = normed_sum.forward(maps, scales, shifts, statistics)
    dmaps, dscales, dshifts = normed_sum.backward(dy, maps, scales, known, statistics, [True] * 3)
    limit = LIMITS[maps[0].dtype]
    assert made.dtype == maps[0].dtype
    check(made, y, 0, limit)
    for mine, theirs in zip([one.mean for one in statistics] + [one.var for one in statistics], running, strict=True):
        check(mine, theirs, 0, LIMITS[mine.dtype])
    assert all(one.stride() == z.stride() for one, z in zip(dmaps, maps, strict=True) if one is not None)
    for mine_, theirs in zip([*dmaps, *dscales, *dshifts], grads, strict=True):
        assert mine_ is not None
        check(mine_, theirs, dy.double().norm().item(), limit)


@every_shape
@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_what_the_equations_say(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, kernels: list[str]
) -> None:
    run_and_check(given(shape, dtype, memory_format))
    assert kernels == ["forward", "backward"]


@every_shape
@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_norm_gives_what_the_equations_say(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    run_and_check(given(shape, dtype, memory_format))


def test_a_mean_that_is_large_beside_the_deviation_costs_no_digits(kernels: list[str]) -> None:
    maps, scales, shifts, statistics, dy = given((4, 6, 9, 5), torch.float32, torch.channels_last, mean=1000)
    y, _, _ = expected(maps, scales, shifts, statistics, dy)
    made, _ = normed_sum.forward(maps, scales, shifts, statistics)
    assert kernels == ["forward"]
    check(made, y, 0, 1e-3)  # the sum of squares less the square of the mean would be off by more than the map


@pytest.mark.parametrize("why", ["float64", "two maps", "no scale", "another layout"])
def test_what_the_kernels_cannot_do_torchs_own_norm_does(why: str, kernels: list[str]) -> None:
    dtype = torch.float64 if why == "float64" else torch.float32
    maps, scales, shifts, statistics, dy = given((2, 8, 5, 7), dtype, torch.channels_last)
    chosen: list[Tensor | None] = [*scales]
    lowest: list[Tensor | None] = [*shifts]
    if why == "two maps":
        maps, chosen, lowest, statistics = maps[:2], chosen[:2], lowest[:2], statistics[:2]
    elif why == "no scale":
        chosen[0], lowest[0] = None, None
    elif why == "another layout":
        maps[1] = maps[1].contiguous()
    y, known = normed_sum.forward(maps, chosen, lowest, statistics)
    dmaps, dscales, _ = normed_sum.backward(dy, maps, chosen, known, statistics, [True, False, True][: len(maps)])
    assert not kernels
    assert y.isfinite().all()
    assert [one is None for one in dmaps] == [False, True, False][: len(maps)]
    assert [one is None for one in dscales] == [one is None for one in chosen]


def test_a_single_number_in_a_channel_has_no_statistics() -> None:
    maps, scales, shifts, statistics, _ = given((1, 8, 1, 1), torch.float32, torch.channels_last)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        normed_sum.forward(maps, scales, shifts, statistics)


def test_the_operators_say_their_shapes_without_running(kernels: list[str]) -> None:
    maps, scales, shifts, statistics, dy = given((2, 8, 5, 7), torch.bfloat16, torch.channels_last)
    running = [*(one.mean for one in statistics), *(one.var for one in statistics)]
    checks = ("test_schema", "test_faketensor")
    numbers = ([0.1] * 3, [1e-5] * 3)
    torch.library.opcheck(
        normed_sum.forward_op, (maps, [*scales, *shifts], running, *numbers, None, ""), test_utils=checks
    )
    known = normed_sum.forward(maps, scales, shifts, statistics)[1][0]
    torch.library.opcheck(normed_sum.backward_op, (dy, maps, known, None, None, "", False), test_utils=checks)
    torch.library.opcheck(normed_sum.backward_op, (dy, maps, known, dy, None, "silu", True), test_utils=checks)
    assert kernels
