"""How much each branch of a block counts: the scales that were learnt, and what they are worth once they are folded.

|γ|      of the norm at the end of a branch, filter by filter; of the online form, the scale of its kernel
|γ|/σ    by which the kernel of the branch is multiplied when it is folded, σ = √(var + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.blocks.anatomy import BranchKernel


@dataclass(frozen=True, slots=True)
class Spread:
    """How magnitudes are distributed: their mean, and their quantiles at 0, ¼, ½, ¾ and 1."""

    mean: float
    least: float
    lower: float
    median: float
    upper: float
    most: float

    @classmethod
    def of(cls, numbers: Tensor) -> Spread:
        """Describe the magnitudes of numbers.

        >>> Spread.of(torch.tensor([-1.0, 0.0, 3.0, 2.0, -4.0]))
        Spread(mean=2.0, least=0.0, lower=1.0, median=2.0, upper=3.0, most=4.0)
        """
        magnitudes = numbers.detach().double().abs().flatten()
        places = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64, device=magnitudes.device)
        return cls(magnitudes.mean().item(), *torch.quantile(magnitudes, places).tolist())


@dataclass(frozen=True, slots=True)
class BranchScale:
    """The scales of one branch over its filters; `folded` is |γ|/σ, what they are worth in the folded kernel."""

    name: str
    gamma: Spread
    folded: Spread


@dataclass(frozen=True, slots=True)
class LayerScales:
    """The scales of every branch of one block."""

    path: str
    kind: str
    branches: tuple[BranchScale, ...]


def scales_of(path: str, kind: str, branches: Sequence[BranchKernel]) -> LayerScales | None:
    """Describe the scales of a block; None where its branches have none."""
    found = []
    for branch in branches:
        if branch.gamma is not None:
            worth = branch.gamma if branch.sigma is None else branch.gamma / branch.sigma
            found.append(BranchScale(branch.name, Spread.of(branch.gamma), Spread.of(worth)))
    return LayerScales(path, kind, tuple(found)) if found else None
