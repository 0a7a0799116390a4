"""One tap, or a few numbers of a tensor; all others are right."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess
from surgeon.proof.ulps import ulp

_SHARE = 50  # one number in so many may be wrong, or eight of a small tensor


class Taps(Hypothesis):
    """Few numbers of B's tensors are not the expected ones, and no rule was found in them."""

    place = 115

    def guess(self, case: Case) -> Iterator[Guess]:
        wrong = []
        for key, (wanted, held) in case.off.items():
            unit = ulp(wanted.to(held.dtype)) * max(1.0, case.units)
            far = (held.double() - wanted).abs() > torch.maximum(unit, 2.0**-51 * wanted.abs().max())
            wrong += [(key, tuple(place)) for place in far.nonzero().tolist()]
            if len(wrong) > max(8, wanted.numel() // _SHARE):
                return
        if not wrong:
            return
        key, place = wrong[0]
        wanted, held = case.off[key]
        first = f"{key}[{', '.join(map(str, place))}] is {held[place]:.7g} where {wanted[place]:.7g} is expected"
        total = sum(wanted.numel() for wanted, _ in case.off.values())
        if len(wrong) == 1:
            yield case.guess("one tap", f"{first}; all other numbers are right")
        else:
            yield case.guess("a few taps", f"{len(wrong)} of {total} numbers are wrong: {first}, …")
