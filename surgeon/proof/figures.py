"""Figures that are shown but not judged: how far apart outputs in the models' own dtype are, in common measures.

SQNR = −20 · log₁₀(relative L2), in dB
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.proof.distance import matched, real, relative_l2, worst
from surgeon.proof.report import Distance, Histogram

_BIN = 0.25  # of log₁₀: four bins for every power of ten
_DECADES = 40  # what is nearer or further than 10^±40 counts in the outermost bins


def figures(label: str, exact: tuple[Any, Any] | None, own: tuple[Any, Any]) -> Distance:
    """Measure outputs of (B, A) for the input with this label: in float64 if they run there, and in their own dtype.

    Raises:
        VerifyError: the outputs differ in structure, shape or dtype.
    """
    outs = matched(*own)
    rows = [_row(real(b).double(), real(a).double()) for b, a in outs]
    scores = [(b, a) for b, a in outs if _is_scores(a)]
    return Distance(
        input=label,
        float64=None if exact is None else worst(*exact),
        own=worst(*own),
        max_abs=max(row[0] for row in rows),
        max_rel=max(row[1] for row in rows),
        sqnr_db=min(row[2] for row in rows),
        cosine=min(row[3] for row in rows),
        top1=min((_top1(b, a) for b, a in scores), default=None),
        histogram=histogram(outs),
    )


def histogram(outs: Sequence[tuple[Tensor, Tensor]]) -> Histogram:
    """Count how far apart the numbers of the outputs (B, A) are.

    >>> histogram([(torch.tensor([1.0, 2.0, 3.15]), torch.tensor([1.0, 1.0, 2.0]))])
    Histogram(lowest=0.0, width=0.25, counts=(2,), equal=1, odd=0)
    """
    bins: Counter[int] = Counter()
    equal = odd = 0
    for b, a in ((real(b).double(), real(a).double()) for b, a in outs):
        is_same = (a == b) | (a.isnan() & b.isnan())
        far = (b - a).abs()[~is_same]
        is_number = far.isfinite()
        equal += int(is_same.sum())
        odd += int((~is_number).sum())
        steps = (far[is_number].log10().clamp(-_DECADES, _DECADES) / _BIN).floor().long().cpu()
        if steps.numel():
            least = int(steps.min())
            bins.update({least + i: count for i, count in enumerate(steps.sub(least).bincount().tolist())})
    first, last = min(bins, default=0), max(bins, default=-1)
    return Histogram(first * _BIN, _BIN, tuple(bins[i] for i in range(first, last + 1)), equal, odd)


def _is_scores(tensor: Tensor) -> bool:
    """Whether a tensor can hold scores of classes: masks have no largest entry, and complex numbers no order."""
    is_ordered = tensor.dtype is not torch.bool and not tensor.is_complex()
    return is_ordered and tensor.dim() == 2 and tensor.shape[1] > 1


def _row(b: Tensor, a: Tensor) -> tuple[float, float, float, float]:
    """Give (max abs, max rel, SQNR in dB, cosine) of one output."""
    difference = (b - a).abs()
    relative = relative_l2(b, a)
    cosine = nn.functional.cosine_similarity(b.flatten(), a.flatten(), dim=0).item() if a.any() else 1.0
    largest = (difference / a.abs())[a != 0].max().item() if a.any() else 0.0  # what is 0 in A has no relative error
    return difference.max().item(), largest, -20 * math.log10(relative) if relative else math.inf, cosine


def _top1(b: Tensor, a: Tensor) -> float:
    return (b.double().argmax(1) == a.double().argmax(1)).double().mean().item()
