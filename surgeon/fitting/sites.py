"""Which sites are fitted so far, in a file from which a fit that was interrupted goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from surgeon.blocks.norms import core_of
from surgeon.errors import StoreError
from surgeon.fitting import states
from surgeon.fitting.processes import Processes
from surgeon.fitting.settle import SiteFit
from surgeon.fitting.units import Unit


class Sites:
    """The units that are done, and what was found for them; the first process reads and writes the file."""

    def __init__(self, path: Path | None, identity: str, processes: Processes) -> None:
        self.path, self.identity, self.processes = path, identity, processes
        self.done: list[Unit] = []
        self.fits: list[SiteFit] = []

    def resume_(self, units: Sequence[Unit]) -> None:
        """Give the units that are done in the file their numbers.

        Raises:
            StoreError: it is damaged, or of another fit.
        """
        told: tuple[list[str], list[SiteFit]] = ([], [])
        with self.processes.agreeing():
            if self.path is not None and self.processes.is_first and self.path.exists():
                told = self._read_(self.path, {unit.path: unit for unit in units})
        paths, self.fits = self.processes.told(told)
        self.done = [unit for unit in units if unit.path in paths]
        for unit in self.done:
            self.processes.same_(list(fitted(unit).values()))

    def add_(self, units: Sequence[Unit], fits: Sequence[SiteFit]) -> None:
        """Note that units are fitted, and write it down."""
        for unit in units:
            self.processes.same_(list(fitted(unit).values()))
        self.done += units
        self.fits += fits
        with self.processes.agreeing():
            if self.path is not None and self.processes.is_first:
                told = {
                    "done": [unit.path for unit in self.done],
                    "sites": [dataclasses.asdict(one) for one in self.fits],
                }
                tensors = {key: tensor for unit in self.done for key, tensor in fitted(unit).items()}
                states.write(self.path, self.identity, told, tensors)

    def _read_(self, path: Path, units: dict[str, Unit]) -> tuple[list[str], list[SiteFit]]:
        told, held = states.read(path, self.identity, ("done", "sites"), "fit")
        try:
            fits = [SiteFit(**one) for one in told["sites"]]
            with torch.no_grad():
                for name in told["done"]:
                    for key, tensor in fitted(units[name]).items():
                        tensor.copy_(held[key])
        except (KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{path} is a damaged state of a fit", todo="Remove it to begin again.") from error
        return told["done"], fits


def fitted(unit: Unit) -> dict[str, Tensor]:
    """Name all tensors that fitting a unit may change."""
    own = (*unit.made.named_parameters(), *unit.made.named_buffers())
    found = {f"{unit.path}.{name}": tensor for name, tensor in own}
    if unit.norm is not None:
        mean = core_of(unit.norm).running_mean
        assert isinstance(mean, Tensor)
        found[f"{unit.path} norm.running_mean"] = mean
    return found
