"""A tensor that was scaled: as a whole, or by channel; with −1 it has the wrong sign."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess
from surgeon.proof.ulps import ulp

_FEWEST = 4  # numbers of a channel, so that one factor explains something


class Scaled(Hypothesis):
    """Times one factor, or one for each filter, the expected tensors are B's."""

    place = 100

    def guess(self, case: Case) -> Iterator[Guess]:
        large = [key for key, (wanted, _) in case.off.items() if wanted.dim() >= 2 or wanted.numel() >= _FEWEST]
        for key in large[:1]:
            wanted, held = case.off[key]
            factor = _factors(wanted.reshape(1, -1), held.double().reshape(1, -1))
            if (residual := case.changed(lambda one: one * factor)) is not None:  # noqa: B023
                yield case.guess(*_in_words(key, factor, residual), residual)
            if wanted.dim() < 2 or wanted[0].numel() < _FEWEST:
                continue
            factors = _factors(wanted.reshape(len(wanted), -1), held.double().reshape(len(wanted), -1))
            far = (held.double() - wanted).abs() > 1.01 * ulp(wanted.to(held.dtype))
            factors = torch.where(far.reshape(len(wanted), -1).any(1), factors, 1.0)
            residual = case.changed(lambda one: _by_row(one, factors))  # noqa: B023
            if residual is not None:
                yield case.guess(*_in_words(key, factors, residual), residual)


def _factors(wanted: Tensor, held: Tensor) -> Tensor:
    """Give the factor of every row that brings what is expected nearest to what is held."""
    size = (wanted * wanted).sum(1)
    return torch.where(size > 0, (wanted * held).sum(1) / size.clamp_min(1e-300), 1.0)


def _by_row(one: Tensor, factors: Tensor) -> Tensor | None:
    return one * factors.reshape(-1, *[1] * (one.dim() - 1)) if len(one) == len(factors) else None


def _in_words(key: str, factors: Tensor, residual: float) -> tuple[str, str]:
    changed = factors[(factors != 1).nonzero().flatten()]
    which = "" if len(factors) == 1 else f"{len(changed)} of {len(factors)} filters of "
    span = (
        f"{changed.min():.6g}"
        if changed.max() - changed.min() < 1e-6
        else f"{changed.min():.4g} to {changed.max():.4g}"
    )
    is_sign = bool(((changed + 1).abs() < 1e-3).all())
    kind = "sign" if is_sign else "scale"
    what = "have the other sign" if is_sign else f"are scaled by {span}"
    return kind, f"{which}{key} {what}: so the expected one is B's {close(residual)}"
