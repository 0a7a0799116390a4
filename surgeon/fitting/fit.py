"""Fit a converted network to its original, on images without labels: site by site, in the order of execution."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from surgeon.errors import DataError, FitError
from surgeon.fitting import foresee, importance, states, statistics
from surgeon.fitting.cache import Cache
from surgeon.fitting.data import Data
from surgeon.fitting.foresee import Foreseen
from surgeon.fitting.identity import network_hash
from surgeon.fitting.measure import Worth, measure, totals
from surgeon.fitting.passes import Pass
from surgeon.fitting.processes import ALONE, Processes
from surgeon.fitting.settle import SiteFit, settle_
from surgeon.fitting.sites import Sites
from surgeon.fitting.together import together
from surgeon.fitting.units import Unit, units
from surgeon.models import devices
from surgeon.models.progress import Progress, parts, silent
from surgeon.surgery.history import versions


@dataclass(frozen=True, slots=True)
class How:
    """How to fit.

    `refit`: the layers behind blocks as well; `metric`: errors are weighed by what they cost at the outputs; `norms`:
    statistics are estimated anew where the outputs come nearer by it.
    """

    refit: bool = True
    metric: bool = True
    norms: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """What fitting did to a network: every site before and after, and the whole beside its original."""

    sites: tuple[SiteFit, ...]
    before: Worth
    after: Worth
    has_new_statistics: bool
    seconds: float
    left: tuple[str, ...] = ()  # layers behind blocks about which the images say too little


def fit_(
    converted: nn.Module,
    reference: nn.Module,
    data: Data,
    how: How | None = None,
    *,
    processes: Processes = ALONE,
    state: Path | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Fit:
    """Fit all units of a network itself; both networks are in eval mode and on one device.

    After every layer the file `state` holds what is fitted so far, and a fit of the same networks to the same images
    goes on from it; it stays, finished, until the caller removes it. All processes give the whole data.

    Raises:
        DataError: the images say too little about a site, or the network does not run on them.
        FitError: the networks do not belong together, or another process failed.
        StoreError: the state cannot be written, or is of another fit.

    The network is as it was after any of these.
    """
    begun = time.monotonic()
    run = _Run(converted, reference, data, how or How(), processes, cache or Cache())
    with as_it_was(converted):
        found, foreseen = run.prepare()
        sites = Sites(state, run.identity("sites", network_hash(converted), run.how), processes)
        progress("measuring it as converted", 0)
        before = worth(converted, reference, data, processes)
        metrics = run.metrics([unit for group in found for unit in group], parts(progress, 0.02, 0.1))
        run.fit_sites_(found, foreseen, metrics, sites, parts(progress, 0.1, 0.9))
        progress("measuring it as fitted", 0.9)
        after, is_new = run.estimate_statistics_()
    fitted = {one.path for one in sites.fits}
    left = tuple(unit.path for unit in sites.done if unit.path not in fitted)
    return Fit(tuple(sites.fits), before, after, is_new, time.monotonic() - begun, left)


def worth(converted: nn.Module, reference: nn.Module, data: Data, processes: Processes = ALONE) -> Worth:
    """Compare both networks on the shares of all processes."""
    if processes.count == 1:
        return measure(converted, reference, data)
    with processes.agreeing():
        found = measure(converted, reference, data.share(processes.rank, processes.count))
    sums = torch.tensor(totals(found), dtype=torch.float64)
    processes.add_([sums])
    return Worth(*sums.tolist())


@dataclass(frozen=True, slots=True)
class _Run:
    """One fit: the networks, the images, and how."""

    converted: nn.Module
    reference: nn.Module
    data: Data
    how: How
    processes: Processes
    cache: Cache

    def identity(self, *parts: object) -> str:
        """Hash the images, the original and the versions, and what else something depends on."""
        device = devices.of(self.reference)
        known = (self.data.digest, network_hash(self.reference), sorted(versions().items()), device and device.type)
        return states.identity_of(*known, *parts)

    def prepare(self) -> tuple[list[list[Unit]], Foreseen]:
        """List the units, as they share passes, and foresee what they take."""
        processes = self.processes
        with processes.agreeing():
            first = next(iter(self.data), None)
            if first is None:
                raise DataError(f"{self.data.source} has no images", todo="Give some hundred.")
            found = units(self.converted, self.reference, first.inputs.batched(2), refit=self.how.refit)
            inputs = first.inputs.batched(1)
            foreseen = foresee.foresee(found, self.converted, self.reference, inputs, self.data.images)
            groups = together(found, self.converted, inputs, foreseen.fits)
            mine = self.identity(
                network_hash(self.converted), self.how, [[one.path for one in group] for group in groups]
            )
        first_has = processes.told(mine)
        with processes.agreeing():
            if mine != first_has:
                raise FitError(
                    "this process has other networks, images or options than the first one",
                    todo="Start all of them with the same command, on machines that have the same files.",
                )
        return groups, foreseen

    def metrics(self, found: Sequence[Unit], progress: Progress) -> Mapping[str, Tensor]:
        """Say what errors of every block cost at the outputs."""
        blocks = [unit for unit in found if unit.is_block]
        if not self.how.metric or not blocks:
            return {}
        progress("gradients of the original", 0)
        key = self.identity("metrics", self.how.seed, [unit.path for unit in blocks])
        return self.cache.kept(
            key,
            lambda: importance.metrics(self.reference, blocks, self.data, self.how.seed, self.processes),
            self.processes,
        )

    def fit_sites_(
        self,
        groups: Sequence[Sequence[Unit]],
        foreseen: Foreseen,
        metrics: Mapping[str, Tensor],
        sites: Sites,
        progress: Progress,
    ) -> None:
        """Fit the units that are not done yet, those together that share a pass."""
        foreseen.begun = time.monotonic()
        sites.resume_([unit for group in groups for unit in group])
        rest = [group for group in groups if not set(group) <= set(sites.done)]
        for group in rest:
            self._fit_(group, metrics, sites, foreseen.progress(group, rest, len(sites.done), progress))
            foreseen.note(group)

    def _fit_(self, group: Sequence[Unit], metrics: Mapping[str, Tensor], sites: Sites, progress: Progress) -> None:
        """Collect what units see, and solve for them; a layer behind blocks stays where these say too little."""
        collected = Pass(group)
        what = ", ".join(unit.path for unit in group)
        collected.run(self.converted, self.reference, self.data, progress, what, processes=self.processes)
        fits = []
        with self.processes.agreeing():
            for unit in group:
                seen = collected.sums.pop(unit)
                if unit.is_block or not any(view.is_thin for view in seen.values()):
                    fits.append(settle_(unit, seen, metrics.get(unit.path)))
        sites.add_(group, fits)

    def estimate_statistics_(self) -> tuple[Worth, bool]:
        """Estimate the statistics of norms anew, where the outputs come nearer by it; say so, and what it is worth."""
        after = worth(self.converted, self.reference, self.data, self.processes)
        if not self.how.norms or not statistics.norms_in(self.converted):
            return after, False
        undo = statistics.estimate_(self.converted, self.data, self.processes)
        again = worth(self.converted, self.reference, self.data, self.processes)
        if _is_nearer(again, after):
            return again, True
        undo()
        return after, False


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put all numbers of a network back if what is done to it fails."""
    kept = [(one, one.detach().clone()) for one in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for one, number in kept:
            with torch.inference_mode(one.is_inference()), torch.no_grad():  # inference_mode(False) switches grad on
                one.copy_(number)
        raise


def _is_nearer(one: Worth, other: Worth) -> bool:
    return one.relative_l2 is not None and other.relative_l2 is not None and one.relative_l2 < other.relative_l2
