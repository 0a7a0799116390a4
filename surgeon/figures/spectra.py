"""What an octave conv sends to its low stream, and how much of that the low stream cannot hold.

The low stream has every second row and column. It can hold frequencies up to a quarter of a cycle for each pixel of the
high stream, which is half of the highest one that a map has (Nyquist), in both directions:

    share = Σ |X[v, u]|² over max(|v|, |u|) > ¼,  divided by Σ |X[v, u]|² over all (v, u) but (0, 0)

X is the Fourier transform of the high map of one channel, under a Hann window, so that a map whose opposite borders
differ has no frequencies from the jump between them. What a channel has on average under the window is taken away
first: it is no frequency, and every resolution holds it. The window blurs a spectrum by one step in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.blocks.two_streams import TwoStreams
from surgeon.conv import streams
from surgeon.errors import CaptureError
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, names, shadow, where
from surgeon.models.sandbox import quietly

HELD = 0.5  # of the highest frequency: what half the resolution holds
_RING = 0.125  # of the highest frequency: how wide a ring of frequencies is
_LEAST = 4  # pixels of a side that has frequencies beyond a quarter and below


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The frequencies of the maps that one octave conv sends to its low stream, on one example input.

    Attributes:
        path, kind: the conv, and its class.
        channels, size: of the high map that it sends, and of how many low channels are made of it (`low`).
        share: of the energy that varies over a map, what the low stream cannot hold.
        share_of_all: the same of all energy, also that of each channel's average.
        frequencies: the middle of each ring of frequencies, as a share of the highest one of a row; up to √2.
        power: what a frequency of the ring has on average, beside the average of all; 1 everywhere is white noise.
    """

    path: str
    kind: str
    channels: int
    low: int
    size: tuple[int, int]
    share: float
    share_of_all: float
    frequencies: tuple[float, ...]
    power: tuple[float, ...]


def spectra_of(model: nn.Module, inputs: Inputs) -> tuple[Spectrum, ...]:
    """Run a model once in eval mode, and look at what every octave conv with low channels behind it sends there.

    Raises:
        CaptureError: the model does not accept the inputs.
    """
    found: dict[str, Spectrum] = {}
    copy = shadow(model)
    handles = []
    for module, paths in names(copy).items():
        if isinstance(module, TwoStreams) and module.low_out:
            hook = partial(_look, found, paths[0])
            handles.append(module.register_forward_pre_hook(hook))
    if not handles:
        return ()
    try:
        with quietly():
            inputs.cast_for(copy).call(in_mode(copy, False))
    except Exception as error:
        raise CaptureError(
            f"the model does not run on an input of {inputs}: {where(error)}",
            todo="Give the input that it was made for: --input 1,3,224,224.",
        ) from error
    return tuple(found.values())


def spectrum_of(high: Tensor) -> tuple[float, float, tuple[float, ...], tuple[float, ...]] | None:
    """Measure maps (n, channels, h, w): both shares, frequencies and power; None where they are too small or constant.

    >>> checkerboard = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    >>> share, *_ = spectrum_of(checkerboard[None, None])
    >>> round(share, 12)
    1.0
    """
    if min(high.shape[-2:]) < _LEAST:
        return None
    energy, average = _energies(high.detach().double())
    rows, columns = (2 * torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in high.shape[-2:])
    total = energy.sum().item()
    if not total > 0 or not torch.isfinite(energy).all():
        return None
    beyond = torch.maximum(rows[:, None], columns[None, :]) > HELD
    lost = energy[beyond].sum().item()
    radius = torch.sqrt(rows[:, None] ** 2 + columns[None, :] ** 2)
    ring = (radius / _RING).long()
    middles, power = [], []
    for number in sorted(set(ring.flatten().tolist())):
        inside = (ring == number) & (radius > 0)
        if inside.any():
            middles.append((number + 0.5) * _RING)
            power.append(energy[inside].mean().item() * (energy.numel() - 1) / total)
    return lost / total, lost / (total + average), tuple(middles), tuple(power)


def _energies(x: Tensor) -> tuple[Tensor, float]:
    """Sum |X|² over images and channels, (h, w), with 0 where the averages are; and what these would have there."""
    height, width = x.shape[-2:]
    across, down = (torch.hann_window(side, dtype=x.dtype, device=x.device) for side in (width, height))
    window = down[:, None] * across[None, :]
    average = (x * window).sum((-2, -1), keepdim=True) / window.sum()
    energy = torch.fft.fft2((x - average) * window).abs().square().sum((0, 1)).cpu()
    energy[0, 0] = 0
    constant = (average.square().sum() * window.square().sum()).item() * height * width
    return energy, constant


def _look(found: dict[str, Spectrum], path: str, module: nn.Module, args: Sequence[Any]) -> None:
    """Measure what a conv sends to the low stream, at its first call."""
    assert isinstance(module, TwoStreams)
    given = args[0]
    high, low, *_ = given if not isinstance(given, Tensor) else _split(given, module)
    if path in found or high is None:
        return
    high = module.resampled(high, low)[0]
    measured = spectrum_of(high)
    if measured is not None:
        kind = getattr(module, "name", type(module).__name__)
        size, low_out = (high.shape[-2], high.shape[-1]), streams.count(module.low_out)
        found[path] = Spectrum(path, kind, high.shape[1], low_out, size, *measured)


def _split(x: Tensor, module: TwoStreams) -> Sequence[Tensor | None]:
    return streams.split(x, module.low_in) if module.low_in else (x, None)
