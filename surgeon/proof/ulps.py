"""Units in the last place: how far stored tensors are from what they should be, and jitter of that size.

ulp = the distance from a number to the next one that its dtype can hold
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST_SHIFTED = 0.75  # by chance it is 4 / √numbers; half of all if numbers were cut off instead of rounded
MOST_UNEQUAL = 0.1  # float64 arithmetic in another order changes one rounding in 10⁸, and more only where taps cancel
_ENOUGH = 32  # numbers to judge a share of
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def ulp(tensor: Tensor) -> Tensor:
    """The unit in the last place of every element in the tensor's own dtype, as float64.

    >>> ulp(torch.tensor([1.0, 3.0])) * 2**23
    tensor([1., 2.], dtype=torch.float64)
    """
    info, kind = torch.finfo(tensor.dtype), _BITS.get(tensor.dtype)
    if kind is None:
        _, exponent = torch.frexp(tensor.double().abs().clamp_min(info.tiny))
        return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)
    bits = torch.iinfo(kind).bits
    exponents = (2 ** (bits - 1) - 1) & ~(2 ** round(-math.log2(info.eps)) - 1)  # where the dtype holds them
    power = (tensor.detach().view(kind) & exponents).view(tensor.dtype).clamp_min(info.tiny)
    power.masked_fill_(~power.isfinite(), 0.5)  # of what is not finite
    units: Tensor = power.double().mul_(info.eps)
    return units


def is_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits: NaN is itself, and −0 is not 0."""
    kind = _BITS.get(one.dtype)
    return torch.equal(one, other) if kind is None else torch.equal(one.view(kind), other.view(kind))


@dataclass(frozen=True, slots=True)
class Off:
    """How far a stored tensor is from what it should be: from `exact`, rounded once to its dtype.

    `ulps`: the worst number, in units in the last place. `shift`: by how large a share more numbers are larger than
    smaller, or further from zero than nearer; chance makes it small, and 1 says that all were moved the same way.
    `share`: how many are not equal, which is next to none where float64 was rounded to a smaller dtype.
    """

    ulps: float
    shift: float = 0.0
    share: float = 0.0

    @property
    def is_wrong(self) -> bool:
        return not (self.ulps <= 1 and self.shift <= MOST_SHIFTED and self.share <= MOST_UNEQUAL)


def worst_ulps(stored: nn.Module, exact: nn.Module) -> float:
    """Give how many units in the last place a module's tensors are from its float64 twin's, rounded once."""
    ours, theirs = stored.state_dict(), exact.state_dict()
    apart = [_ulps(ours[key], theirs[key]) for key in theirs if key in ours]
    return math.inf if ours.keys() ^ theirs.keys() else max(apart, default=0.0)


def stored_off(b: nn.Module, replay: nn.Module, a: nn.Module) -> dict[str, Off]:
    """Compare every tensor that B stores with the replay's, rounded once; A, which it was made from, has the dtypes."""
    ours, theirs, given = b.state_dict(), replay.state_dict(), a.state_dict()
    kinds = {value.dtype for value in given.values() if isinstance(value, Tensor)}
    found = {key: _as_stored(ours[key], theirs[key], given.get(key), kinds) for key in theirs if key in ours}
    return found | dict.fromkeys(ours.keys() ^ theirs.keys(), Off(math.inf))


def _as_stored(stored: Any, exact: Any, known: Any, kinds: Collection[torch.dtype]) -> Off:
    """Compare a tensor with the replay's; A's of the same name says its class and dtype, else `kinds`, those of A."""
    if not isinstance(stored, Tensor) or not isinstance(exact, Tensor):  # a module's own extra state
        return Off(_ulps(stored, exact))
    if type(stored) is not (type(known) if isinstance(known, Tensor) else Tensor):
        return Off(math.inf)  # a class of its own may compute something else
    new = {*kinds} | ({exact.dtype} - {torch.float64})  # in which the replay is, whatever A is in
    return off(stored, exact, {known.dtype} if isinstance(known, Tensor) else new, is_once_rounded=True)


def same(stored: Tensor, exact: Tensor, *, is_judged: bool) -> Off:
    """Compare a tensor with that of another model. If a run has judged what is computed with it, values may differ.

    Its dtype and its class may not, and if it is nearly the same it may not be shifted as a whole.
    """
    if stored.dtype != exact.dtype or type(stored) is not type(exact):
        return Off(math.inf)
    found = off(stored, exact, {exact.dtype})
    return Off(0.0) if is_judged and found.ulps > 1 else found


def off(stored: Any, exact: Any, dtypes: Collection[torch.dtype], *, is_once_rounded: bool = False) -> Off:
    """Compare one tensor with what it should be; it must have one of the dtypes."""
    if isinstance(stored, Tensor) and stored.dtype not in dtypes:
        return Off(math.inf)
    ulps = _ulps(stored, exact)
    if not 0 < ulps <= 1 or stored.numel() < _ENOUGH:
        return Off(ulps)
    rounded = exact.to(stored.dtype)
    signs = torch.sign(stored.double() - rounded.double())
    outwards = signs * torch.sign(rounded.double())
    shift = max(abs(one.mean().item()) for one in (signs, outwards))
    is_exact = is_once_rounded and stored.dtype != torch.float64
    return Off(ulps, shift, signs.abs().mean().item() if is_exact else 0.0)


class Jitter:
    """Moves every number by `units` in its last place, up or down; the result is float64.

    Half a unit cannot be stored in float64, so a float64 number moves by a whole unit; so does every number that keeps
    its dtype. `still` says, by the address where a tensor begins, which of its numbers stay where they are.
    """

    def __init__(
        self, seed: int, *, units: float = 0.5, keeps_dtype: bool = False, still: Mapping[int, Tensor] | None = None
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.units, self.keeps_dtype, self.still = units, keeps_dtype, still or {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        coin = torch.empty(tensor.shape, dtype=torch.int8).random_(0, 2, generator=self.generator)
        coin = coin.to(tensor.device) * 2 - 1
        is_whole = self.keeps_dtype or tensor.dtype == torch.float64
        if self.still and tensor.numel() and (kept := self.still.get(tensor.data_ptr())) is not None:
            coin = coin.masked_fill(kept.to(tensor.device), 0)
        moved = ulp(tensor).mul_(coin).mul_(max(self.units, 1) if is_whole else self.units).add_(tensor)
        return moved.to(tensor.dtype) if self.keeps_dtype else moved


def _ulps(stored: Any, exact: Any) -> float:
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
