"""What fitting will take: multiply-adds and bytes of every unit, from one image, before any work is done.

a pass      both networks up to the unit, and the products of what its filters see, in float64
solving     some factorisations of the (d, d) moments of d features
memory      the moments, in halves and whole, and what solving lays beside them
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgeon.blocks.fittable import View
from surgeon.conv import streams
from surgeon.conv.patches import size_of
from surgeon.fitting.passes import LAID_OUT
from surgeon.fitting.units import Unit
from surgeon.fitting.watch import watched
from surgeon.models import cost
from surgeon.models.call import Inputs
from surgeon.models.progress import Progress

_FLOAT64 = 2  # how much longer a multiply-add takes
_FACTORED = 8  # d³ multiply-adds of solving
_MATRICES = 5  # d² numbers that there are at once while a unit is solved for
_PATIENCE = 2.0  # seconds after which a guess at the time that is left is good enough to be shown


@dataclass(frozen=True, slots=True)
class Needs:
    """What one unit takes: multiply-adds for each image of a pass, those of solving, and bytes of memory."""

    runs: float  # both networks up to it
    products: float
    solving: float
    held: int  # bytes of its sums during the pass
    peak: int  # bytes while it is solved for

    def work(self, images: int) -> float:
        return (self.runs + self.products) * images + self.solving


@dataclass(slots=True)
class Foreseen:
    """What all units take, and how long the rest will, by how long what is done took."""

    needs: dict[Unit, Needs]
    images: int
    begun: float = field(default_factory=time.monotonic)
    done: float = 0.0  # multiply-adds since then

    @property
    def bytes(self) -> int:
        """The most memory beyond that of both networks and of running them."""
        return LAID_OUT * 4 + max((one.peak for one in self.needs.values()), default=0)

    def fits(self, units: Sequence[Unit]) -> bool:
        """Whether the sums of these units may be held at once: as many bytes as solving for the largest one takes."""
        return sum(self.needs[unit].held for unit in units) <= max(self.bytes // 2, 2**27)

    def work(self, units: Sequence[Unit]) -> float:
        """Multiply-adds of a pass that these units share, and of solving for them."""
        runs = max(self.needs[unit].runs for unit in units) * self.images
        return runs + sum(self.needs[unit].work(self.images) - self.needs[unit].runs * self.images for unit in units)

    def note(self, units: Sequence[Unit]) -> None:
        """Note that these units are done."""
        self.done += self.work(units)

    def progress(
        self, units: Sequence[Unit], all_units: Sequence[Sequence[Unit]], before: int, progress: Progress
    ) -> Progress:
        """Make a progress for the pass of these units, that tells how long all the rest will take."""
        here, whole = self.work(units), sum(map(self.work, all_units))
        count, done = len(self.needs), self.done

        def tell(what: str, share: float) -> None:
            so_far = done + here * share
            left = self._seconds_left(so_far, whole - so_far)
            progress(f"fitting {what}, {before + 1} of {count}{in_words(left)}", so_far / whole)

        return tell

    def _seconds_left(self, done: float, rest: float) -> float | None:
        """Guess how long so many multiply-adds take; None as long as little is known."""
        taken = time.monotonic() - self.begun
        return taken * rest / done if done and taken >= _PATIENCE else None


def in_words(left: float | None) -> str:
    """Say how long the rest takes.

    >>> in_words(None), in_words(31.2), in_words(250), in_words(8000)
    ('', ', about 31 s left', ', about 4 min left', ', about 2.2 h left')
    """
    if left is None:
        return ""
    if left < 90:
        return f", about {left:.0f} s left"
    return f", about {left / 60:.0f} min left" if left < 5400 else f", about {left / 3600:.1f} h left"


def foresee(units: Sequence[Unit], converted: nn.Module, reference: nn.Module, inputs: Inputs, images: int) -> Foreseen:
    """Run both networks once on a small call, and say what fitting these units to so many images takes."""
    products: dict[Unit, list[_Product]] = {}
    count = max(inputs.batch, 1)
    made = _macs_until([(unit, unit.made) for unit in units], converted, inputs, products)
    original = _macs_until([(unit, unit.original) for unit in units], reference, inputs, None)
    needs = {}
    for unit in units:
        runs = (made.get(unit, 0) + original.get(unit, 0)) / count
        needs[unit] = _needs(runs, products.get(unit, []), count)
    return Foreseen(needs, images)


@dataclass(frozen=True, slots=True)
class _Product:
    """The sums of one view in one call: groups, features, outputs and pixels."""

    groups: int
    features: int
    outputs: int
    rows: int

    @property
    def numbers(self) -> int:
        return self.groups * self.features * (self.features + self.outputs)


def _macs_until(
    modules: Sequence[tuple[Unit, nn.Module]],
    model: nn.Module,
    inputs: Inputs,
    products: dict[Unit, list[_Product]] | None,
) -> dict[Unit, int]:
    """Count the multiply-adds of a network up to the last call of every unit, and note what the units see."""
    found: dict[Unit, int] = {}

    def note(unit: Unit, args: Sequence[Any], _: Any) -> None:
        found[unit] = counter.macs
        if products is not None:
            products.setdefault(unit, []).extend(_product(unit, view) for view in unit.views(args))

    with cost.Counter() as counter:
        watched(model, modules, inputs, note)
    return found


def _product(unit: Unit, view: View) -> _Product:
    features = sum(math.prod((path.spec.c_in, *path.spec.kernel)) for path in view.paths) // view.groups
    seen = view.paths[0]
    rows = len(seen.seen) * math.prod(size_of(seen.seen, seen.spec)) * (4 if seen.is_up else 1)
    return _Product(view.groups, features, streams.count(view.filters) // view.groups, rows)


def _needs(runs: float, products: Sequence[_Product], count: int) -> Needs:
    """Add up what the views of one unit take; sums of several calls are the same ones."""
    work = sum(one.rows * one.groups * one.features * (one.features / 2 + one.outputs) for one in products)
    views = {(one.groups, one.features, one.outputs): one for one in products}.values()
    held = 8 * 2 * sum(one.numbers for one in views)
    largest = max((8 * _MATRICES * one.groups * one.features**2 for one in views), default=0)
    solving = sum(_FACTORED * one.groups * one.features**3 for one in views)
    return Needs(runs, _FLOAT64 * work / count, _FLOAT64 * solving, held, held + largest)
