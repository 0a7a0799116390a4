"""Networks → all there is to see of their kernels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType

from surgeon.display.kernels import kernels_view
from surgeon.display.shown import Shown
from surgeon.figures.gammas import LayerScales
from surgeon.figures.kept import KeptEnergy
from surgeon.figures.magnitudes import AverageMagnitude, LayerMagnitude
from surgeon.figures.spectra import Spectrum


@dataclass(frozen=True, slots=True)
class NetworkKernels:
    """What there is to see of one network.

    Attributes:
        label, name: (a), (b) …, and what the user calls the network.
        averages: one matrix for each shape of kernels, 3×3 first.
        layers: one matrix for each conv and block, in the order of the modules.
        scales: |γ| and |γ|/σ of every branch, for blocks whose branches have them.
        kept: the energy that thinned-out blocks keep of the convs that they replaced, from the plans in the history.
        spectra: what octave convs send to their low streams; empty where no input is known.
        left_out: the convs and blocks that are in no matrix, and why.
    """

    label: str
    name: str
    averages: tuple[AverageMagnitude, ...]
    layers: tuple[LayerMagnitude, ...]
    scales: tuple[LayerScales, ...] = ()
    kept: tuple[KeptEnergy, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {**asdict(self), "left_out": dict(self.left_out)}


@dataclass(frozen=True, slots=True)
class KernelFigures(Shown):
    """Where in their kernels networks have their large weights, side by side as in figure 6 of the ACNet paper."""

    networks: tuple[NetworkKernels, ...]
    seed: int  # of the control's weights

    def __rich__(self) -> RenderableType:
        return kernels_view(self)

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data, as `surgeon kernels --json` prints it."""
        return {"seed": self.seed, "networks": [network.to_dict() for network in self.networks]}
