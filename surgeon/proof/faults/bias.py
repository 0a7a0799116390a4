"""A bias that is lost, or in which single numbers are wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgeon.proof.distance import relative_l2
from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess


class Bias(Hypothesis):
    """B's module has no bias, or zeros there, or a bias of which a few numbers are wrong; all else is as expected."""

    place = 70

    def guess(self, case: Case) -> Iterator[Guess]:
        alone = case.wanted.keys() ^ case.held.keys()
        for key in case.wanted:
            wanted, held = case.wanted[key], case.held.get(key)
            if key.rpartition(".")[2] != "bias" or not wanted.any() or (case.off.keys() | alone) - {key}:
                continue
            size = f"expected is one of size {wanted.abs().max():.3g}, and all other tensors are right"
            if held is None:
                yield case.guess("bias lost", f"B has no {key}; {size}")
            elif key not in case.off:
                continue
            elif not held.any():
                yield case.guess("bias lost", f"B's {key} is zero; {size}")
            else:
                yield from _few(case, key)


def _few(case: Case, key: str) -> Iterator[Guess]:
    wanted, held = case.off[key]
    far = (held.double() - wanted).abs() > 4 * torch.finfo(case.dtype).eps * (wanted.abs() + wanted.abs().mean())
    channels = far.nonzero().flatten().tolist()
    if 0 < len(channels) <= max(1, len(wanted) // 8):
        named = ", ".join(f"{i} ({wanted[i]:.3g} expected, {held[i]:.3g} found)" for i in channels[:3])
        says = f"{len(channels)} of {len(wanted)} numbers of {key} are wrong: {named}"
        residual = relative_l2(held[~far].double(), wanted[~far]) if not bool(far.all()) else 0.0
        yield case.guess("a few numbers of a bias", says, residual)
