"""Kernels by least squares: sums over patches → the taps whose output is nearest to what is wanted.

For the patches x that a filter sees and the numbers t that it should give, over all pixels of all images,

    min over w, b   E (w·x + b − t)² + λ |w − w₀|²,     H = Cov[x],  g = Cov[t, x]

is solved on the taps K that a filter has, the others being zero, by

    w_K = w₀_K + (H_KK + λ)⁻¹ (g − H w₀)_K,     b = E t − w·E x

For λ = 0 and t = w*·x this is w_K = H_KK⁻¹ H_K: w*, the kernel of Optimal Brain Surgeon (Hassibi & Stork 1993), layer
by layer as in Optimal Brain Compression (Frantar, Singh & Alistarh 2022, arXiv:2208.11580, section 4). Filters with the
same taps share one factorisation. w₀ are the taps that the conv had: the result is never further from what is wanted
than they are, and a channel that is constant, about which the images say nothing, keeps them. λ is the share of the
mean variance of a feature, out of `RIDGES`, that does best on one half of the images when fitted to the other.

Where filters have different taps, what one lacks another may make up for later in the network. With a metric S (out,
out) that says what an error e costs there, E eᵀ S e, all filters are solved together, by conjugate gradients: the
Kronecker-factored curvature of Martens & Grosse 2015 (arXiv:1503.05671), restricted to the taps that there are.

All of it is float64. `Sums` add up, so processes and interrupted passes can put theirs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # λ, as shares of the mean variance of a feature
_CHUNK = 2**23  # float64 numbers that are laid out at once: 64 MB
_STRIPS, _NARROW = 6, 64  # of a symmetric product, and how wide one is at least
_MOST_STEPS = 100  # of conjugate gradients
_SMALL = 1e-4  # a remaining gradient, beside the first, at which they end


@dataclass(slots=True)
class Sums:
    """Sums over pixels, for each of g groups with d features and o outputs."""

    rows: Tensor  # () how many pixels
    seen: Tensor  # (g, d) Σ x
    wanted: Tensor  # (g, o) Σ t
    second: Tensor  # (g, d, d) Σ x xᵀ
    cross: Tensor  # (g, o, d) Σ t xᵀ
    square: Tensor  # (g, o) Σ t²

    @classmethod
    def none(cls, groups: int, features: int, outputs: int, *, device: torch.device | None = None) -> Sums:
        """Begin."""
        shapes = [(), (groups, features), (groups, outputs)]
        shapes += [(groups, features, features), (groups, outputs, features), (groups, outputs)]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self.tensors, other.tensors, strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.seen, self.wanted, self.second, self.cross, self.square

    @property
    def is_constant(self) -> bool:
        """Whether every feature is the same at all pixels."""
        squares = float(self.second.diagonal(dim1=1, dim2=2).sum())
        return squares * int(self.rows) <= (1 + 1e-12) * float(self.seen.square().sum())

    def add_(self, x: Tensor, t: Tensor) -> None:
        """Add pixels: features (n, g, d, pixels) and what is wanted (n, g, o, pixels)."""
        at_once = max(1, _CHUNK // (x.shape[1] * x.shape[2]))
        for x_part, t_part in zip(torch.split(x, at_once, 3), torch.split(t, at_once, 3), strict=True):
            xs, ts = (one.permute(1, 2, 0, 3).flatten(2).double() for one in (x_part, t_part))  # (g, ·, rows)
            self.rows += xs.shape[2]
            self.seen += xs.sum(2)
            self.wanted += ts.sum(2)
            _add_squares_(self.second, xs)
            self.cross.baddbmm_(ts, xs.mT)
            self.square += ts.square().sum(2)


def _add_squares_(second: Tensor, x: Tensor) -> None:
    """Add x xᵀ (g, d, d) of (g, d, rows): strip by strip, each from the diagonal on, and the mirror of that."""
    features = x.shape[1]
    if features < _STRIPS * _NARROW:
        second.baddbmm_(x, x.mT)
        return
    limits = [features * i // _STRIPS for i in range(_STRIPS + 1)]
    for matrix, rows in zip(second, x, strict=True):
        for start, stop in pairwise(limits):
            matrix[start:stop, start:].addmm_(rows[start:stop], rows[start:].T)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T


@dataclass(frozen=True, slots=True)
class Problem:
    """Least squares from the sums: H (g, d, d), G (g, o, d) and the variance of what is wanted (g, o).

    `mean_seen` and `mean_wanted` are zero where no bias is free.
    """

    second: Tensor
    cross: Tensor
    square: Tensor
    mean_seen: Tensor
    mean_wanted: Tensor

    @classmethod
    def of(cls, sums: Sums, *, has_bias: bool) -> Problem:
        rows, free = sums.rows.clamp_min(1), float(has_bias)
        x, t = sums.seen / rows * free, sums.wanted / rows * free
        return cls(
            second=(sums.second / rows).baddbmm_(x[:, :, None], x[:, None], alpha=-1),
            cross=(sums.cross / rows).baddbmm_(t[:, :, None], x[:, None], alpha=-1),
            square=(sums.square / rows - t.square()).clamp_min(0),
            mean_seen=x,
            mean_wanted=t,
        )

    def loss(self, taps: Tensor) -> Tensor:
        """The mean squared error of every filter of (g, o, d), with the bias that fits it best: (g, o)."""
        fitted = ((taps @ self.second - 2 * self.cross) * taps).sum(2)
        return (self.square + fitted).clamp_min(0)

    def cost(self, taps: Tensor, metric: Tensor) -> float:
        """What the errors of all filters (1, o, d) cost together, tr S E e eᵀ, but for a constant."""
        fitted = taps[0] @ self.second[0] @ taps[0].T
        crossed = taps[0] @ self.cross[0].T
        return float((metric * (fitted - crossed - crossed.T)).sum())

    def error(self, taps: Tensor, bias: Tensor) -> Tensor:
        """The mean squared error of every filter with this bias (g, o)."""
        return self.loss(taps) + (self.bias(taps) - bias).square()

    def bias(self, taps: Tensor) -> Tensor:
        """The bias that fits taps best: (g, o)."""
        return self.mean_wanted - (taps @ self.mean_seen[:, :, None])[:, :, 0]

    def ridge(self, share: float) -> Tensor:
        """λ of every group: (g, 1)."""
        return share * self.second.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)


def ridge_for(halves: tuple[Problem, Problem], start: Tensor, kept: Tensor | None, weight: Tensor) -> float:
    """Find the λ with which taps that are fitted to one half of the images do best on the other; `weight` (g, o)."""

    def left(share: float) -> float:
        fitted = [(one, solve(one, start, kept, share)) for one in halves]
        errors = [other.error(taps, one.bias(taps)) for (one, taps), other in zip(fitted, halves[::-1], strict=True)]
        return sum(float((error * weight).sum()) for error in errors)

    return min(RIDGES, key=left)


def solve(problem: Problem, start: Tensor, kept: Tensor | None = None, ridge: float = 0.0) -> Tensor:
    """Give the taps (g, o, d) that are nearest in output; `start` are those that they are held to.

    `kept` (o, d) says which taps each filter has, where there is one group; `start` is zero elsewhere.

    >>> x, w = torch.randn(1, 1, 3, 50), torch.randn(1, 2, 3, dtype=torch.float64)
    >>> sums = Sums.none(1, 3, 2)
    >>> sums.add_(x, (w @ x.double()[0])[None])
    >>> torch.allclose(solve(Problem.of(sums, has_bias=True), w), w)
    True
    """
    residual, held = problem.cross - start @ problem.second, problem.ridge(ridge)
    if kept is None:
        return start + _divided(residual, problem.second, held)
    taps = start.clone()
    for pattern, filters in _patterns(kept):
        part = residual[:, filters][:, :, pattern]
        within = problem.second[:, pattern][:, :, pattern]
        taps[0, filters[:, None], pattern] += _divided(part, within, held)[0]
    return taps


def solve_together(problem: Problem, start: Tensor, taps: Tensor, kept: Tensor, metric: Tensor, ridge: float) -> Tensor:
    """Improve taps (1, o, d) for what errors cost by the metric (o, o): min tr S (E e eᵀ + λ (W − W₀)(W − W₀)ᵀ).

    Steps are those of the filters alone, of which each has the inverse on its own taps.
    """
    held = problem.ridge(ridge)[0]
    second = problem.second[0].clone()
    second.diagonal().add_(held)
    cross = problem.cross[0] + held * start[0]
    parts = [_Filters.of(filters, pattern, second, metric) for pattern, filters in _patterns(kept)]
    found = taps[0]
    left = (metric @ (cross - found @ second)) * kept
    step = direction = _eased(left, parts)
    first = power = (left * step).sum()
    for _ in range(_MOST_STEPS):
        if not power > _SMALL**2 * first:
            break
        seen = torch.empty_like(direction)
        for part in parts:
            seen[part.which] = direction[part.which][:, part.taps] @ part.rows
        bent = (metric @ seen) * kept
        length = power / (direction * bent).sum()
        found, left = found + length * direction, left - length * bent
        step = _eased(left, parts)
        power, before = (left * step).sum(), power
        direction = step + power / before * direction
    return found[None]


@dataclass(frozen=True, slots=True)
class _Filters:
    """Filters that have the same taps: which, what belongs to these taps, and what each of them costs."""

    which: Tensor
    taps: Tensor
    rows: Tensor  # (taps, d) of the second moments
    factor: Tensor  # (taps, taps), of Cholesky
    cost: Tensor  # (filters, 1)

    @classmethod
    def of(cls, which: Tensor, taps: Tensor, second: Tensor, metric: Tensor) -> Self:
        rows = second[taps]
        factor, failed = torch.linalg.cholesky_ex(rows[:, taps])
        if failed:
            factor = rows[:, taps].diagonal().clamp_min(torch.finfo(rows.dtype).tiny).sqrt().diag()
        return cls(which, taps, rows, factor, metric.diagonal()[which, None])


def _eased(left: Tensor, parts: Sequence[_Filters]) -> Tensor:
    """Solve for every filter alone."""
    made = torch.zeros_like(left)
    for part in parts:
        inside = torch.cholesky_solve(left[part.which][:, part.taps].T, part.factor).T
        made[part.which[:, None], part.taps] = inside / part.cost
    return made


def _divided(right: Tensor, second: Tensor, ridge: Tensor) -> Tensor:
    """Give right (H + λ)⁻¹ for (g, o, d) and (g, d, d); where all features are constant there is nothing to divide."""
    floor = torch.finfo(second.dtype).tiny ** 0.5
    ridged = second.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(ridge.clamp_min(floor))
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if failed.any():  # far from round numbers: H has eigenvalues below its rounding, and λ does not reach them
        solved: Tensor = torch.linalg.solve(ridged, right.mT).mT
        return solved
    found: Tensor = torch.cholesky_solve(right.mT, factor).mT
    return found


def _patterns(kept: Tensor) -> list[tuple[Tensor, Tensor]]:
    """List the different sets of taps, each with the filters that have it."""
    patterns, which = torch.unique(kept, dim=0, return_inverse=True)
    return [(pattern.nonzero()[:, 0], (which == i).nonzero()[:, 0]) for i, pattern in enumerate(patterns)]
