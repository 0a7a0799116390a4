"""Kernels by least squares, beside a dense solver that is given every patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.conv.least_squares import RIDGES, Problem, Sums, ridge_for, solve, solve_together
from surgeon.conv.patches import patches
from surgeon.conv.spec import ConvSpec

SPECS = [
    ConvSpec(4, 6, (3, 3), padding=(1, 1), bias=False),
    ConvSpec(6, 8, (3, 1), padding=(1, 0), stride=(2, 1), groups=2, bias=False),
    ConvSpec(3, 5, (1, 1), bias=False),
]


def _random(spec: ConvSpec, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, what a kernel gives for them with some noise, and other taps to begin with."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = drawn(3, spec.c_in, 7, 6) + 0.5
    kernel = drawn(*spec.weight_shape)
    t = F.conv2d(x, kernel, None, spec.stride, spec.pads[::2], spec.dilation, spec.groups)
    return x, t + 0.3 * drawn(*t.shape) + 2, kernel + drawn(*kernel.shape)


def _sums(x: Tensor, t: Tensor, spec: ConvSpec) -> Sums:
    seen, wanted = patches(x, spec), t.flatten(2).unflatten(1, (spec.groups, -1))
    sums = Sums.none(spec.groups, seen.shape[2], wanted.shape[2])
    for image in range(len(x)):
        sums.add_(seen[image : image + 1], wanted[image : image + 1])
    return sums


def _dense(
    x: Tensor, t: Tensor, start: Tensor, spec: ConvSpec, kept: Tensor, share: float, *, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Solve for every filter by itself, with all patches as rows and one row for each tap that is held to its start."""
    made, biases = torch.zeros_like(start), torch.zeros(spec.c_out, dtype=torch.float64)
    columns = F.unfold(x, spec.kernel, spec.dilation, spec.pads[::2], spec.stride)
    per_out, size = spec.c_out // spec.groups, columns.shape[1] // spec.groups
    for i in range(spec.c_out):
        group = i // per_out
        rows = columns[:, group * size : (group + 1) * size].permute(0, 2, 1).flatten(0, 1).numpy()
        wanted = t[:, i].flatten().numpy()
        spread = ((rows - rows.mean(0)) ** 2 if has_bias else rows**2).mean(0).mean()
        hold = np.sqrt(share * spread * len(rows))
        mask, begin = kept[i].numpy(), start[i].flatten().numpy()
        free = np.where(mask)[0]
        design = np.hstack([rows[:, free], np.ones((len(rows), 1))][: 1 + has_bias])
        held = np.hstack([hold * np.eye(len(free)), np.zeros((len(free), 1))][: 1 + has_bias])
        found = np.linalg.lstsq(np.vstack([design, held]), np.concatenate([wanted, hold * begin[free]]), rcond=None)[0]
        made.flatten(1)[i, free] = torch.from_numpy(found[: len(free)])
        biases[i] = found[-1] if has_bias else 0
    return made, biases


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1])
def test_all_taps_are_those_of_a_dense_solver(spec: ConvSpec, has_bias: bool, share: float) -> None:
    x, t, start = _random(spec)
    problem = Problem.of(_sums(x, t, spec), has_bias=has_bias)
    begin = start.flatten(1).unflatten(0, (spec.groups, -1))
    found = solve(problem, begin, None, share)
    expected, bias = _dense(
        x, t, start, spec, torch.ones_like(start.flatten(1), dtype=torch.bool), share, has_bias=has_bias
    )
    assert (found.flatten(0, 1) - expected.flatten(1)).abs().max() < 1e-10
    assert (problem.bias(found).flatten() - bias).abs().max() < 1e-10


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("share", [0.0, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_taps_that_are_left_out_are_made_up_for_by_the_others(has_bias: bool, share: float, seed: int) -> None:
    spec = SPECS[0]
    x, t, start = _random(spec, seed)
    kept = torch.rand(3, 36, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = kept[[0, 1, 2, 0, 1, 0]]  # some filters have the same taps
    begin = start.flatten(1) * kept
    problem = Problem.of(_sums(x, t, spec), has_bias=has_bias)
    found = solve(problem, begin[None], kept, share)[0]
    expected, bias = _dense(x, t, begin, spec, kept, share, has_bias=has_bias)
    assert (found - expected.flatten(1)).abs().max() < 1e-10
    assert (problem.bias(found[None])[0] - bias).abs().max() < 1e-10
    assert not found[~kept].any()


def test_errors_are_those_of_the_conv() -> None:
    for spec in SPECS:
        x, t, kernel = _random(spec)
        taps = kernel.flatten(1).unflatten(0, (spec.groups, -1))
        bias = torch.linspace(-1, 2, spec.c_out, dtype=torch.float64)
        out = F.conv2d(x, kernel, bias, spec.stride, spec.pads[::2], spec.dilation, spec.groups)
        problem = Problem.of(_sums(x, t, spec), has_bias=True)
        expected = (out - t).square().mean((0, 2, 3))
        assert torch.allclose(problem.error(taps, bias.view(spec.groups, -1)).flatten(), expected, rtol=1e-11, atol=0)
        best = (out - t).var((0, 2, 3), correction=0)
        assert torch.allclose(problem.loss(taps).flatten(), best, rtol=1e-11, atol=0)


def test_filters_that_are_solved_together_minimise_what_errors_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.conv.least_squares._SMALL", 1e-13)
    spec = SPECS[0]
    x, t, start = _random(spec)
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    metric = root @ root.T + 0.5 * torch.eye(6, dtype=torch.float64)
    kept = torch.rand(6, 36, generator=generator) < 0.6
    begin = (start.flatten(1) * kept)[None]
    problem = Problem.of(_sums(x, t, spec), has_bias=True)
    found = solve_together(problem, begin, solve(problem, begin, kept, 1e-3), kept, metric, 1e-3)[0]
    rows = patches(x, spec)[:, 0].permute(0, 2, 1).flatten(0, 1)
    wanted = t.flatten(2).permute(0, 2, 1).flatten(0, 1)
    rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    # (S ⊗ H) w on the free taps, all filters at once
    second = rows.T @ rows / len(rows)
    held = 1e-3 * second.diagonal().mean() * torch.eye(36, dtype=torch.float64)
    free = kept.flatten()
    matrix = torch.kron(metric, second + held)[free][:, free]
    right = (metric @ (wanted.T @ rows / len(rows) + begin[0] @ held)).flatten()[free]
    expected = torch.linalg.solve(matrix, right)
    assert (found.flatten()[free] - expected).abs().max() < 1e-10
    assert not found[~kept].any()


def test_sums_add_up_and_do_not_depend_on_how_much_is_laid_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ConvSpec(48, 4, (3, 3), padding=(1, 1), bias=False)  # wide enough to be multiplied in strips
    x, t, _ = _random(spec)
    whole = _sums(x, t, spec)
    parts = _sums(x[:1], t[:1], spec) + _sums(x[1:], t[1:], spec)
    monkeypatch.setattr("surgeon.conv.least_squares._CHUNK", 2000)
    small = _sums(x, t, spec)
    rows = F.unfold(x, 3, padding=1).permute(0, 2, 1).flatten(0, 1)
    assert torch.allclose(whole.second[0], rows.T @ rows, rtol=1e-12, atol=1e-10)
    for one, other, third in zip(whole.tensors, parts.tensors, small.tensors, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-10)
        assert torch.allclose(one, third, rtol=1e-12, atol=1e-10)


def test_the_ridge_is_the_one_that_does_best_on_the_other_half() -> None:
    spec = SPECS[0]
    x, t, start = _random(spec)
    halves = [Problem.of(_sums(x[part], t[part], spec), has_bias=True) for part in (slice(0, 1), slice(1, 3))]
    begin, weight = start.flatten(1)[None], torch.ones(1, 6, dtype=torch.float64)

    def left(share: float) -> float:
        errors = []
        for one, other in (halves, halves[::-1]):
            taps = solve(one, begin, None, share)
            errors.append(other.error(taps, one.bias(taps)).sum())
        return float(sum(errors))

    assert ridge_for((halves[0], halves[1]), begin, None, weight) == min(RIDGES, key=left)
