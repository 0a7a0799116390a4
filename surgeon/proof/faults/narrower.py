"""Weights that went through a smaller dtype, or through few steps of a quantiser, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.proof.distance import relative_l2
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_DTYPES = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)  # coarsest first
_LEVELS = 256


class Narrower(Hypothesis):
    """Every number of B's is one of a smaller dtype, and the expected one rounded to that."""

    place = 110

    def guess(self, case: Case) -> Iterator[Guess]:
        if not case.off:
            return
        for dtype in _DTYPES:
            if torch.finfo(dtype).eps <= torch.finfo(case.dtype).eps:
                continue
            if all(_went_through(dtype, *pair) for pair in case.off.values()):
                name = str(dtype).removeprefix("torch.")
                far = max(relative_l2(held, wanted) for wanted, held in case.off.values())
                says = f"every number of {', '.join(case.off)} is one that {name} holds, and the expected one"
                yield case.guess("rounded", f"{says} rounded to that ({close(far).removeprefix('to ')} from it)")
        if all(_has_steps(*pair) for pair in case.off.values()):
            yield case.guess("rounded", f"{', '.join(case.off)} hold at most {_LEVELS} values, as after quantising")


def _went_through(dtype: torch.dtype, wanted: Tensor, held: Tensor) -> bool:
    if not torch.equal(held.float().to(dtype).to(held.dtype), held):
        return False
    info = torch.finfo(dtype)
    within = info.eps * wanted.abs() + info.smallest_normal * info.eps
    return bool(((held.double() - wanted).abs() <= within).all())


def _has_steps(wanted: Tensor, held: Tensor) -> bool:
    values: Tensor = torch.unique(held)
    is_few = len(values) <= _LEVELS < held.numel() // 2 and len(set(wanted.flatten().tolist())) > 2 * len(values)
    return is_few and bool(((held.double() - wanted).abs() <= 2 * (values.max() - values.min()) / len(values)).all())
