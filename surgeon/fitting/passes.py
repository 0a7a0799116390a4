"""One pass over the images: what the filters of a unit see in the converted network, and what its original gave.

Both networks are run up to the last call of the unit only, in eval mode. The converted one is as it is by then, with
everything before the unit fitted, so that a unit also makes up for what was lost before it (asymmetric reconstruction:
Zhang et al. 2015, arXiv:1505.06798, section 3.3, who do this for low-rank convs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.blocks.fittable import View
from surgeon.conv.exact import Total
from surgeon.conv.least_squares import Sums
from surgeon.errors import DataError
from surgeon.fitting.data import Data
from surgeon.fitting.processes import ALONE, Processes
from surgeon.fitting.units import Unit
from surgeon.fitting.watch import copied, watched
from surgeon.models.call import Inputs
from surgeon.models.copies import where
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import quietly

LAID_OUT = 2**25  # bytes of float32 features that are laid out at once
_NUMBERS = 2**21  # in the images that a network is run on at once: 14 pictures of 224 pixels


@dataclass(frozen=True, slots=True)
class Seen:
    """A view of a unit, and the sums over the even and over the odd batches."""

    view: View
    halves: tuple[Sums, Sums]

    @property
    def is_thin(self) -> bool:
        """Whether there are fewer than two pixels for each tap of a filter, or all pixels are alike."""
        whole = self.halves[0] + self.halves[1]
        return float(whole.rows) < 2 * whole.seen.shape[1] or whole.is_constant


class Pass:
    """Collects the sums of units over a pass of the data; the units must not depend on each other."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units, self.calls = units, sum(unit.calls for unit in units)
        self.sums: dict[Unit, dict[str, Seen]] = {}
        self._totals: dict[Unit, dict[str, _Totals]] = {unit: {} for unit in units}

    def run(
        self,
        converted: nn.Module,
        reference: nn.Module,
        data: Data,
        progress: Progress = silent,
        what: str = "",
        *,
        processes: Processes = ALONE,
    ) -> None:
        """Look at all batches, of which every process takes its share.

        Raises:
            DataError: the network does not run on them.
        """
        done = 0
        with processes.agreeing():
            for i, batch in processes.batches(data):
                for part in in_parts(batch.inputs):
                    self._add(converted, reference, part)
                self._end_batch(i % 2)
                done += batch.count * processes.count
                progress(what, min(done / data.images, 1.0))
            if not done:  # the sums have their shapes all the same
                self._add(converted, reference, next(iter(data)).inputs.batched(1))
        for unit in self.units:
            totals = self._totals.pop(unit)
            self.sums[unit] = {name: totals.pop(name).seen(processes) for name in list(totals)}

    def _end_batch(self, half: int) -> None:
        for totals in self._totals.values():
            for one in totals.values():
                one.end_batch(half)

    def _add(self, converted: nn.Module, reference: nn.Module, inputs: Inputs) -> None:
        outputs: dict[Unit, list[Tensor]] = {unit: [] for unit in self.units}
        seen: dict[Unit, list[Sequence[Any]]] = {unit: [] for unit in self.units}
        keep = copied if self.calls > 1 else _as_it_is
        try:
            pairs = [(unit, unit.original) for unit in self.units]
            if converted is reference:  # units that are not in a network yet, and see what their originals do
                watched(reference, pairs, inputs, self._add_call)
                return
            watched(reference, pairs, inputs, lambda unit, _, out: outputs[unit].append(keep(out)), self.calls)
            pairs = [(unit, unit.made) for unit in self.units]
            watched(converted, pairs, inputs, lambda unit, args, _: seen[unit].append(keep(args)), self.calls)
        except Exception as error:
            raise DataError(
                f"the network does not run on the images: {where(error)}",
                todo="Give images of the size and channels that it takes, or a --preprocess that makes them so.",
            ) from error
        for unit in self.units:
            made, given = seen.pop(unit), outputs.pop(unit)
            for args, out in zip(made, given, strict=True):
                self._add_call(unit, args, out)

    def _add_call(self, unit: Unit, args: Sequence[Any], out: Tensor) -> None:
        for view in unit.views(args):
            self._add_view(unit, view, view.wanted(unit.wanted(out)))

    def _add_view(self, unit: Unit, view: View, wanted: Tensor) -> None:
        totals = self._totals[unit]
        with quietly():
            for features, target in laid_out(view, wanted):
                if view.name not in totals:
                    sizes = (*features.shape[1:3], target.shape[2])
                    totals[view.name] = _Totals(view.without_maps(), Sums.none(*sizes, device=features.device))
                totals[view.name].now.add_(features, target)


class _Totals:
    """The sums of one view: those of the batch that is looked at, and the totals of both halves."""

    def __init__(self, view: View, now: Sums) -> None:
        self.view, self.now = view, now
        self.halves = [[Total(one) for one in now.tensors] for _ in range(2)]

    def end_batch(self, half: int) -> None:
        for total, one in zip(self.halves[half], self.now.tensors, strict=True):
            total.add_(one)
            one.zero_()

    def seen(self, processes: Processes) -> Seen:
        """Add up over all processes; the totals are gone then."""
        del self.now
        even, odd = (Sums(*processes.whole(self.halves.pop(0))) for _ in range(2))
        return Seen(self.view, (even, odd))


def in_parts(inputs: Inputs) -> Iterator[Inputs]:
    """Cut a batch so that what a network computes for it fits into memory."""
    images = inputs.batch
    step = max(1, _NUMBERS * images // (inputs.numel or 1))
    if step >= images:
        yield inputs
        return
    for start in range(0, images, step):
        yield inputs.part(start, start + step)


def _as_it_is(value: Any) -> Any:
    return value


def laid_out(view: View, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Lay out some images at a time: (n, groups, features, pixels) and what is wanted (n, groups, outputs, pixels)."""
    size = wanted.shape[-2:]
    per_image = sum(path.spec.c_in * path.spec.kernel[0] * path.spec.kernel[1] for path in view.paths)
    step = max(1, LAID_OUT // (4 * per_image * size.numel()))
    for start in range(0, len(wanted), step):
        images = slice(start, start + step)
        parts = [path.features(images, (size[0], size[1])) for path in view.paths]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        yield features, _in_groups(wanted[images].flatten(2), view.groups)


def _in_groups(maps: Tensor, groups: int) -> Tensor:
    """Cut the channels of (n, channels, pixels) into groups: (n, groups, channels/groups, pixels)."""
    return maps.reshape(len(maps), groups, -1, maps.shape[2])
