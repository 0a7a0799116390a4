"""Networks → all there is to see of their kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import RenderableType
from torch import nn

from surgeon.analysis import example as examples
from surgeon.analysis.example import Example
from surgeon.blocks.two_streams import TwoStreams
from surgeon.display.kernels import kernels_view
from surgeon.display.shown import Shown
from surgeon.errors import FigureError, ModelError
from surgeon.figures import magnitudes
from surgeon.figures.gammas import LayerScales, scales_of
from surgeon.figures.kept import KeptEnergy, kept_in_history
from surgeon.figures.layers import Layer, Layers, layers_of
from surgeon.figures.magnitudes import AverageMagnitude, BranchMagnitude, LayerMagnitude
from surgeon.figures.spectra import Spectrum, spectra_of
from surgeon.models import devices
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked
from surgeon.surgery.look import network_for

Models = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


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
        input, is_drawn: what these were measured on, and whether that was random numbers.
        input, is_drawn: what these were measured on, and whether that was random numbers.
        left_out: the convs and blocks that are in no matrix, and why.
    """

    label: str
    name: str
    averages: tuple[AverageMagnitude, ...]
    layers: tuple[LayerMagnitude, ...]
    scales: tuple[LayerScales, ...] = ()
    kept: tuple[KeptEnergy, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    input: str = ""
    is_drawn: bool = False
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


def kernels(
    models: Models,
    example: Example | None = None,
    *,
    control: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> KernelFigures:
    """Show where in their kernels one or several networks have their large weights, beside untrained ones.

    Give one network, several, or several by name. `example` is an input for networks with octave convs, whose spectra
    are measured on it; without it one is looked for. `control` draws every conv anew, seeded, for comparison.

    >>> figures = kernels(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    >>> figures.networks[0].averages[0].shape, figures.networks[0].averages[0].layers
    ((3, 3), 2)

    Raises:
        FigureError: a network has no conv whose kernel has more than one tap.
    """
    named = _named(models)
    with ordinary():
        made = []
        for i, (name, model) in enumerate(named.items()):
            step = parts(progress, i / len(named), (i + 1) / len(named))
            made.append(_of_one(f"({_letters(i)})", name, model, example, control=control, seed=seed, progress=step))
    return KernelFigures(tuple(made), seed)


def _named(models: Models) -> dict[str, nn.Module]:
    """Give every network a name: its own class, where the user has given none."""
    if isinstance(models, nn.Module):
        models = [models]
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        kinds = [type(model).__name__ for model in models]
        names = [kind if kinds.count(kind) == 1 else f"{kind} {i}" for i, kind in enumerate(kinds, start=1)]
        named = dict(zip(names, models, strict=True))
    if not named:
        raise FigureError("no network was given", todo="Give one network or several: surgeon.kernels(model).")
    return named


def _of_one(
    label: str,
    name: str,
    model: nn.Module,
    example: Example | None,
    *,
    control: bool,
    seed: int,
    progress: Progress,
) -> NetworkKernels:
    if any(parameter.is_meta for parameter in checked(model).parameters()):
        raise ModelError(f"{name}: parameters are on the meta device, and hold no numbers", todo="Load its weights.")
    progress(f"{name}: looking at the convs", 0)
    model = devices.on(model, devices.CPU)
    layers, generator = layers_of(model), torch.Generator().manual_seed(seed)
    found: list[LayerMagnitude] = []
    scales: list[LayerScales] = []
    with torch.no_grad():
        for i, layer in enumerate(layers.found):
            progress(f"{name}: {layer.path}", 0.2 + 0.6 * i / len(layers.found))
            one, scale = _of_layer(layer, layers, generator if control else None)
            found += [] if one is None else [one]
            scales += [] if scale is None else [scale]
    if not found:
        raise _nothing(name, layers)
    progress(f"{name}: looking at its streams", 0.8)
    averages, left_out = magnitudes.averages(found), tuple(layers.left_out.items())
    made = NetworkKernels(label, name, averages, tuple(found), tuple(scales), kept_in_history(model), left_out=left_out)
    return _with_spectra(made, model, example, seed)


def _of_layer(
    layer: Layer, layers: Layers, generator: torch.Generator | None
) -> tuple[LayerMagnitude | None, LayerScales | None]:
    """Measure one conv or block, and with a generator an untrained one beside it."""
    branches = layer.branches()
    kernel = layer.kernel(branches)
    matrix, sums = magnitudes.matrix_of(kernel), magnitudes.sums(kernel)
    if matrix is None:
        is_zero = bool((sums == 0).all())
        layers.left_out[layer.path] = "its kernel is zero" if is_zero else "its kernel holds numbers that are none"
        return None, None
    drawn = None if generator is None else magnitudes.matrix_of(layer.untrained(kernel, generator))
    height, width = kernel.shape[-2:]
    each = []
    for branch in branches:
        own = magnitudes.sums(branch.kernel)
        divided = magnitudes.matrix_of(branch.kernel) or magnitudes.as_matrix(own)  # a branch may start at zero
        each.append(BranchMagnitude(branch.name, divided, (own.max() / sums.max()).item()))
    made = LayerMagnitude(layer.path, layer.kind, layer.geometry, (height, width), matrix, drawn, tuple(each))
    return made, scales_of(layer.path, layer.kind, branches)


def _with_spectra(made: NetworkKernels, model: nn.Module, example: Example | None, seed: int) -> NetworkKernels:
    """Measure what goes to low streams, where there are any and an input is known."""
    if not any(isinstance(module, TwoStreams) and module.low_out for module in model.modules()):
        return made
    inputs = network_for(model, None, seed=seed).inputs if example is None else examples.make(example, seed=seed)
    if inputs is None:
        return made
    return replace(made, spectra=spectra_of(model, inputs), input=str(inputs), is_drawn=inputs.is_random)


def _nothing(name: str, layers: Layers) -> FigureError:
    """Say that there is nothing to see."""
    out = layers.left_out
    said = [f"{path}: {why}" for path, why in list(out.items())[:5]]
    more = [f"and {len(out) - 5} more"] * (len(out) > 5)
    return FigureError(
        f"{name} has no conv whose kernel has more than one tap",
        todo="Give a network with k×k convs; `surgeon survey MODEL` lists those that it has.",
        details=[*said, *more],
    )


def _letters(number: int) -> str:
    """Count in letters: a, b … z, aa, ab.

    >>> _letters(0), _letters(25), _letters(26)
    ('a', 'z', 'aa')
    """
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + "abcdefghijklmnopqrstuvwxyz"[last]
