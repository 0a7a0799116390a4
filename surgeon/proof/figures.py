"""Figures that are shown but not judged: how far apart outputs in the models' own dtype are, in common measures.

SQNR = −20 · log₁₀(relative L2), in dB
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.proof.distance import matched, real, relative_l2, worst
from surgeon.proof.report import Distance


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
    )


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
