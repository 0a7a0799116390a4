"""Average kernel magnitude matrices: where in a kernel its large weights are.

    S[y, x] = Σ_{o, c} |F[o, c, y, x]|      of one conv: over its filters and their channels
    A       = S / max S                     so that its largest entry is 1
    mean A                                  of a network: over all its convs whose kernels have one shape

Ding et al. 2019, ACNet, arXiv:1908.03930, section 4.4 and figure 6, which has the 3×3 convs of a ResNet-56.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]  # rows of a kernel, top first


@dataclass(frozen=True, slots=True)
class BranchMagnitude:
    """The matrix of one branch of a block; `share` is its largest sum beside that of the whole kernel."""

    name: str
    matrix: Matrix
    share: float


@dataclass(frozen=True, slots=True)
class LayerMagnitude:
    """The matrix of one conv or block: of the kernel that it computes with once its branches are folded."""

    path: str
    kind: str  # the name of the block, or the class of the conv
    geometry: str
    shape: tuple[int, int]
    matrix: Matrix
    untrained: Matrix | None = None  # of the same conv or block with freshly drawn weights
    branches: tuple[BranchMagnitude, ...] = ()


@dataclass(frozen=True, slots=True)
class AverageMagnitude:
    """The mean matrix of all convs of a network whose kernels have one shape."""

    shape: tuple[int, int]
    layers: int
    matrix: Matrix
    untrained: Matrix | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sums(kernel: Tensor) -> Tensor:
    """Sum the magnitudes of a kernel (out, in/groups, kh, kw) over filters and channels, in float64 → (kh, kw).

    >>> sums(torch.tensor([[[[1.0, -2.0]]], [[[-1.0, 2.0]]]]))
    tensor([[2., 4.]], dtype=torch.float64)
    """
    return kernel.detach().double().abs().sum((0, 1))


def matrix_of(kernel: Tensor) -> Matrix | None:
    """Divide the sums of a kernel by the largest; None where they are all zero, or not all finite."""
    found = sums(kernel)
    most = found.max().item()
    return as_matrix(found / most) if math.isfinite(most) and most > 0 else None


def mean(matrices: Sequence[Matrix]) -> Matrix:
    """Average matrices of one shape.

    >>> mean([((1.0, 0.0),), ((0.5, 1.0),)])
    ((0.75, 0.5),)
    """
    return as_matrix(torch.tensor(matrices, dtype=torch.float64).mean(0))


def averages(layers: Sequence[LayerMagnitude]) -> tuple[AverageMagnitude, ...]:
    """Average the layers of every kernel shape: 3×3 first, as in the paper, then the shapes that most layers have."""
    shapes: dict[tuple[int, int], list[LayerMagnitude]] = {}
    for layer in layers:
        shapes.setdefault(layer.shape, []).append(layer)
    made = []
    for shape, alike in sorted(shapes.items(), key=lambda item: (item[0] != (3, 3), -len(item[1]), item[0])):
        drawn = [layer.untrained for layer in alike if layer.untrained is not None]
        control = mean(drawn) if len(drawn) == len(alike) else None
        made.append(AverageMagnitude(shape, len(alike), mean([layer.matrix for layer in alike]), control))
    return tuple(made)


def as_matrix(found: Tensor) -> Matrix:
    """Write a tensor (kh, kw) as numbers."""
    return tuple(tuple(row) for row in found.tolist())
