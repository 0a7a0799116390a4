"""Fit a converted network to its original, on images without labels: site by site, in the order of execution."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from surgeon.fitting import importance, statistics
from surgeon.fitting.data import Data
from surgeon.fitting.measure import Worth, measure, totals
from surgeon.fitting.passes import Pass
from surgeon.fitting.processes import Processes
from surgeon.fitting.settle import SiteFit, settle_
from surgeon.fitting.units import Unit, units
from surgeon.models.progress import Progress, parts, silent

_ALONE = Processes()


@dataclass(frozen=True, slots=True)
class How:
    """How to fit.

    `refit`: the layers behind blocks as well; `metric`: errors are weighed by what they cost at the outputs; `norms`:
    statistics are estimated anew where the outputs come nearer by it; `distil`: then train for so many steps. `state`
    is a file in which an interrupted fit is continued, `cache` a folder for what depends on the original alone.
    """

    refit: bool = True
    metric: bool = True
    norms: bool = True
    distil: int = 0
    seed: int = 0
    state: Path | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """What fitting did to a network: every site before and after, and the whole beside its original."""

    sites: tuple[SiteFit, ...]
    before: Worth
    after: Worth
    has_new_statistics: bool
    seconds: float


def fit_(
    converted: nn.Module,
    reference: nn.Module,
    data: Data,
    how: How | None = None,
    *,
    processes: Processes = _ALONE,
    progress: Progress = silent,
) -> Fit:
    """Fit all units of a network itself; both networks are in eval mode and on one device.

    Raises:
        DataError: the images say too little about a site; the network is then fitted in part.
    """
    how, begun = how or How(), time.monotonic()
    found = units(converted, reference, next(iter(data)).inputs.batched(2), refit=how.refit)
    share = data.share(processes.rank, processes.count)
    progress("measuring it as converted", 0)
    before = worth(converted, reference, share, processes)
    metrics = {}
    if how.metric:
        progress("gradients of the original", 0.02)
        metrics = importance.metrics(reference, [unit for unit in found if unit.is_block], share, how.seed, processes)
    sites: list[SiteFit] = []
    for i, unit in enumerate(found):
        step = parts(progress, 0.1 + 0.8 * i / len(found), 0.1 + 0.8 * (i + 1) / len(found))
        sites += _fit_one_(unit, converted, reference, share, metrics.get(unit.path), processes, step)
    progress("measuring it as fitted", 0.9)
    after, is_new = worth(converted, reference, share, processes), False
    if how.norms and statistics.norms_in(converted):
        undo = statistics.estimate_(converted, share, processes)
        again = worth(converted, reference, share, processes)
        if is_new := _is_nearer(again, after):
            after = again
        else:
            undo()
    return Fit(tuple(sites), before, after, is_new, time.monotonic() - begun)


def worth(converted: nn.Module, reference: nn.Module, share: Data, processes: Processes) -> Worth:
    """Compare both networks on the shares of all processes."""
    found = measure(converted, reference, share)
    if processes.count == 1:
        return found
    sums = torch.tensor(totals(found), dtype=torch.float64)
    processes.add_([sums])
    return Worth(*sums.tolist())


def _is_nearer(one: Worth, other: Worth) -> bool:
    return one.relative_l2 is not None and other.relative_l2 is not None and one.relative_l2 < other.relative_l2


def _fit_one_(
    unit: Unit,
    converted: nn.Module,
    reference: nn.Module,
    share: Data,
    metric: Tensor | None,
    processes: Processes,
    progress: Progress,
) -> Sequence[SiteFit]:
    """Collect what a unit sees, and solve for it; a layer that was not converted stays where the images are few."""
    collected = Pass([unit])
    collected.run(converted, reference, share, progress, f"fitting {unit.path}")
    seen = collected.sums[unit]
    processes.add_([one for view in seen.values() for one in view.tensors])
    if not unit.is_block and any(view.is_thin for view in seen.values()):
        return []
    return [settle_(unit, seen, metric)]
