"""The sums of one unit → its kernel, its bias, and how far it is from what is wanted, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgeon.blocks import contract
from surgeon.blocks.fittable import Arrangement, Fittable, View
from surgeon.blocks.norms import core_of
from surgeon.conv import kernels, streams
from surgeon.conv.least_squares import Problem, Sums, ridge_for, solve, solve_together
from surgeon.conv.numbers import cast
from surgeon.errors import DataError, PassError
from surgeon.fitting.passes import Seen
from surgeon.fitting.units import Unit

_TRIED = 2  # arrangements; on the demo network the best one was among them at all of 12 sites
_ROUNDING = 1e-9  # by which a sum of squares may be larger that is smaller in exact numbers


@dataclass(frozen=True, slots=True)
class SiteFit:
    """How far the output of one site is from the original's, as relative root mean square, before and after its fit.

    Channels are weighed by the scale of the norm behind. Before, it has the conv's own taps, as far as it has them.
    """

    path: str
    block: str  # its name, or the class of a layer that was not converted
    before: float
    after: float
    constant: int = 0  # features that are the same in all images, about which these say nothing


@dataclass(slots=True)
class _Solved:
    """The taps of one view, and its squared errors."""

    taps: Tensor
    bias: Tensor
    before: float
    after: float
    size: float
    constant: int
    ridge: float


def settle_(unit: Unit, sums: Mapping[str, Seen], metric: Tensor | None, *, is_quick: bool = False) -> SiteFit:
    """Solve all views of a unit and give it what was found.

    A quick solution, as for a trial, has the first arrangement of taps, and each filter is solved alone.

    Raises:
        DataError: the images do not say enough about it, or hold numbers that are none.
    """
    kernel, scale = unit.kernel, unit.scale.square()
    made, bias, own = torch.zeros_like(kernel), torch.zeros(len(kernel)).to(kernel), _own_bias(unit)
    solved = []
    for seen in sums.values():
        view = seen.view
        part = streams.take(scale, view.filters, 0).view(view.groups, -1)
        start = streams.take(own, view.filters, 0).view(view.groups, -1)
        one = _solve(unit, seen, part, start, None if is_quick else metric, 1 if is_quick else None)
        if not one.after <= one.before + _ROUNDING * one.size:
            raise PassError("fit", f"{unit.path} is further from its original than it was: {one.after} > {one.before}")
        view.put_(one.taps, made)
        bias[[i for first, stop in view.filters for i in range(first, stop)]] = one.bias.flatten()
        solved.append(one)
    _give_(unit, made, bias)
    return _in_short(unit, solved)


def _in_short(unit: Unit, solved: Sequence[_Solved]) -> SiteFit:
    size = sum(one.size for one in solved) or 1.0
    before, after = (math.sqrt(sum(getattr(one, name) for one in solved) / size) for name in ("before", "after"))
    kind = unit.made.name if isinstance(unit.made, Fittable) else type(unit.made).__name__
    return SiteFit(unit.path, kind, before, after, sum(one.constant for one in solved))


def _solve(unit: Unit, seen: Seen, scale: Tensor, bias: Tensor, metric: Tensor | None, most: int | None) -> _Solved:
    """Solve one view; where there are several arrangements of taps, take the one that loses least of the first `most`.

    With one arrangement and no metric, filters do not depend on each other.
    """
    problem = _problem(unit, seen)
    cost = scale
    if metric is not None:
        cost = streams.take(metric.diagonal(), seen.view.filters, 0).view(scale.shape)
    start, choices = seen.view.taps_of(unit.kernel), _choices(unit, seen.view, problem, cost, most)
    first = start * choices[0].kept if choices else start
    before = float((problem.error(first, bias) * scale).sum())
    ridge = _ridge(unit, seen, first, choices[0].kept if choices else None, cost)
    if choices and most == 1 and metric is None:
        choices[0].take_()
        taps = solve(problem, first, choices[0].kept, ridge)
    elif choices:
        whole_metric = cost[0].diag() if metric is None else metric
        ways = _ways(problem, start, choices, whole_metric, ridge)
        fine = [way for way in ways if float((problem.loss(way.taps) * scale).sum()) <= before]
        alone = min(ways, key=lambda way: float((problem.loss(way.alone) * scale).sum()))
        best = min(fine, key=lambda way: way.cost, default=alone)
        best.arrangement.take_()
        taps = best.taps if fine else alone.alone
    else:
        taps = solve(problem, start, None, ridge)
    fitted = problem.bias(taps) if unit.has_bias else torch.zeros_like(bias)
    after = float((problem.error(taps, fitted) * scale).sum())
    constant = int((problem.second.diagonal(dim1=1, dim2=2) <= 0).sum())
    return _Solved(taps, fitted, before, after, float((problem.square * scale).sum()), constant, ridge)


def _problem(unit: Unit, seen: Seen) -> Problem:
    """Put both halves together, and make sure that they say enough; the moments are large, so few are held at once."""
    whole = seen.halves[0] + seen.halves[1]
    _check(unit, whole)
    return Problem.of(whole, has_bias=unit.has_bias)


def _ridge(unit: Unit, seen: Seen, start: Tensor, kept: Tensor | None, cost: Tensor) -> float:
    one, other = (Problem.of(half, has_bias=unit.has_bias) for half in seen.halves)
    return ridge_for((one, other), start, kept, cost)


@dataclass(frozen=True, slots=True)
class _Way:
    """What becomes of a view in one arrangement: the taps that every filter has `alone`, and those of all together."""

    arrangement: Arrangement
    alone: Tensor
    taps: Tensor
    cost: float  # at the outputs, by the metric


def _ways(problem: Problem, start: Tensor, choices: Sequence[Arrangement], metric: Tensor, ridge: float) -> list[_Way]:
    """Solve for all filters together in those arrangements that cost least when every filter is solved for alone."""
    found = []
    for one in choices:
        alone = solve(problem, start * one.kept, one.kept, ridge)
        found.append(_Way(one, alone, alone, problem.cost(alone, metric)))
    made = []
    for way in sorted(found, key=lambda way: way.cost)[:_TRIED]:
        kept = way.arrangement.kept
        taps = solve_together(problem, start * kept, way.alone, kept, metric, ridge)
        made.append(_Way(way.arrangement, way.alone, taps, problem.cost(taps, metric)))
    return made


def _choices(unit: Unit, view: View, problem: Problem, cost: Tensor, most: int | None) -> Sequence[Arrangement]:
    if not isinstance(unit.made, Fittable):
        return ()
    return contract.arrangements(unit.made, view, problem, unit.kernel, cost[0], most)


def _own_bias(unit: Unit) -> Tensor:
    """The bias that the original has by itself: (out,) in float64."""
    bias = getattr(unit.original, "bias", None)
    zeros = torch.zeros(len(unit.kernel)).to(unit.kernel)
    return zeros if bias is None else zeros + bias.detach()


def _check(unit: Unit, held: Sums) -> None:
    """Refuse sums that say too little.

    Raises:
        DataError: NaN or infinite numbers, one map for all, or fewer pixels than taps.
    """
    if not all(bool(one.isfinite().all()) for one in held.tensors):
        raise DataError(
            f"{unit.path}: NaN or infinite numbers go in or come out with these images",
            todo="Look at the images, and at their --preprocess.",
        )
    rows, features = int(held.rows), held.seen.shape[1]
    if held.is_constant:
        raise DataError(
            f"{unit.path}: what it sees is the same at every pixel of every image",
            todo="Give images that differ, as the network meets them.",
        )
    if unit.is_block and rows < features / 4:
        raise DataError(
            f"{unit.path}: {rows} pixels say too little about the {features} taps of a filter",
            todo=f"Give at least {math.ceil(features / rows)} times as many images.",
        )


def _give_(unit: Unit, kernel: Tensor, bias: Tensor) -> None:
    """Write a kernel and a bias; a bias that the unit does not have goes into the norm behind."""
    made: Any = unit.made
    with torch.no_grad():
        if unit.is_block:
            contract.take_kernel_(made, cast(kernel, made.weight.dtype, "weight"), bias)
        else:
            made.weight.copy_(cast(kernel.reshape(made.weight.shape), made.weight.dtype, "weight"))
            if made.bias is not None:
                made.bias.copy_(cast(bias, made.bias.dtype, "bias"))
        if made.bias is None and unit.norm is not None and unit.norm_before is not None:
            behind, was = core_of(unit.norm), kernels.Norm.of(core_of(unit.norm_before)).double()
            replace(kernels.Norm.of(behind).double(), mean=was.mean - bias).write_(behind)
