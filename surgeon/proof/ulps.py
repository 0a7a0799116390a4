"""Units in the last place: how far stored tensors are from what they should be, and jitter of that size.

ulp = the distance from a number to the next one that its dtype can hold
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def ulp(tensor: Tensor) -> Tensor:
    """The unit in the last place of every element in the tensor's own dtype, as float64.

    >>> ulp(torch.tensor([1.0, 3.0])) * 2**23
    tensor([1., 2.], dtype=torch.float64)
    """
    info = torch.finfo(tensor.dtype)
    _, exponent = torch.frexp(tensor.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def worst_ulps(stored: nn.Module, exact: nn.Module) -> float:
    """Give how many units in the last place a module's tensors are from its float64 twin's, rounded once."""
    return max(stored_ulps(stored, exact).values(), default=0.0)


def stored_ulps(b: nn.Module, replay: nn.Module) -> dict[str, float]:
    """Give for every tensor that B stores how many units in the last place it is from the replay's, rounded once."""
    ours, theirs = b.state_dict(), replay.state_dict()
    shared = [key for key in theirs if key in ours]
    apart = {key: _ulps(ours[key], theirs[key]) for key in shared}
    return apart | dict.fromkeys(ours.keys() ^ theirs.keys(), math.inf)


class Jitter:
    """Moves every number by half a unit in its last place, up or down; the result is float64.

    Half a unit cannot be stored in float64, so a float64 number moves by a whole unit; so does every number that keeps
    its dtype.
    """

    def __init__(self, seed: int, *, keeps_dtype: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keeps_dtype = keeps_dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        coin = torch.randint(0, 2, tensor.shape, generator=self.generator).to(tensor.device) - 0.5
        is_whole = self.keeps_dtype or tensor.dtype == torch.float64
        moved = tensor.double() + coin * ulp(tensor) * (2 if is_whole else 1)
        return moved.to(tensor.dtype) if self.keeps_dtype else moved


def _ulps(stored: Tensor, exact: Tensor) -> float:
    if not (isinstance(stored, Tensor) and isinstance(exact, Tensor)):  # a module's own extra state
        return 0.0 if repr(stored) == repr(exact) else math.inf
    if stored.shape != exact.shape:
        return math.inf
    if not stored.is_floating_point():
        return 0.0 if torch.equal(stored, exact) else math.inf
    rounded = exact.to(stored.dtype)
    if torch.equal(stored, rounded):
        return 0.0
    same = (stored == rounded) | (stored.isnan() & rounded.isnan())
    if same.all():
        return 0.0
    stored, rounded = stored[~same], rounded[~same]
    # float64's own rounding in the arithmetic is not an error: taps that cancel are as exact as the largest one
    unit = ulp(rounded).clamp_min(2.0**-51 * exact.nan_to_num().abs().max().item())
    largest = ((stored.double() - rounded.double()).abs() / unit).max().item()
    return math.inf if math.isnan(largest) else largest
