"""Which filters and channels belong together: a matrix of energies → equal groups of rows and of columns.

Of a matrix E (rows, columns) ≥ 0, cut into p groups of rows and p groups of columns, all of one size, what is kept is

    Σ E[i, j]   over the pairs whose row group and column group have the same number.

The best cut is searched for in turns: with the rows fixed, a column j is worth Σ_{i in g} E[i, j] to group g, and two
groups of columns exchange those that gain most, as long as both sides together gain; then the rows.
No turn loses anything. It ends in a local optimum, so it starts from several cuts, the given ones among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

_RANDOM_STARTS = (2, 16)  # for large and for small matrices
_LEAST = 1e-4  # a turn that keeps less than this share more is the last


def share_kept(energy: Tensor, rows: Tensor, columns: Tensor) -> float:
    """The share of the energy (rows, columns) that lies between groups of the same number; 1 where there is none.

    >>> share_kept(torch.tensor([[3.0, 1.0], [0.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    0.875
    """
    total = energy.sum().item()
    return energy[rows[:, None] == columns].sum().item() / total if total else 1.0


def best_groups(energy: Tensor, p: int, starts: Sequence[tuple[Tensor, Tensor]] = ()) -> tuple[Tensor, Tensor]:
    """Give the group of every row and of every column, so that much of the energy is kept; p divides both counts.

    Never less is kept than by any of the `starts`. The same energies give the same groups.

    >>> energy = torch.tensor([[9.0, 0.0, 1.0, 0.0], [0.0, 5.0, 0.0, 5.0], [8.0, 0.0, 9.0, 1.0], [0.0, 6.0, 0.0, 6.0]])
    >>> rows, columns = best_groups(energy, 2)
    >>> share_kept(energy, rows, columns) > 0.95
    True
    """
    # Whole numbers below 2^30: sums of them are exact in any order, so that every machine finds the same groups.
    energy = (energy / energy.max().clamp_min(1e-300) * 2.0**30).round().cpu()
    fewest, most = _RANDOM_STARTS
    generator = torch.Generator().manual_seed(0)
    counts = [torch.arange(count) * p // count for count in energy.shape]
    drawn = [
        (counts[0][torch.randperm(energy.shape[0], generator=generator)],
         counts[1][torch.randperm(energy.shape[1], generator=generator)])
        for _ in range(min(max(2**16 // energy.numel(), fewest), most))
    ]  # fmt: skip
    ends = [_climb(energy, rows, columns, p) for rows, columns in (*starts, *drawn)]
    return max(ends, key=lambda end: share_kept(energy, *end))


def _climb(energy: Tensor, rows: Tensor, columns: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Improve columns and rows by turns until neither can be."""
    kept = -1.0
    while (now := share_kept(energy, rows, columns)) > kept + _LEAST:
        kept = now
        columns = _exchange(_worth(energy.T, rows, p), columns, p)
        rows = _exchange(_worth(energy, columns, p), rows, p)
    return rows, columns


def _worth(energy: Tensor, groups: Tensor, p: int) -> Tensor:
    """What every row of (rows, columns) is worth to each group, given the groups of the columns: (rows, p)."""
    return energy @ torch.nn.functional.one_hot(groups, p).to(energy.dtype)


def _exchange(worth: Tensor, groups: Tensor, p: int) -> Tensor:
    """Exchange members between every two groups once, as long as both sides together gain; the sizes stay.

    Groups are small and pairs of them many, so plain lists take a tenth of the time of tensors.
    """
    table: list[list[float]] = worth.tolist()
    members: list[list[int]] = [[] for _ in range(p)]
    for i, group in enumerate(groups.tolist()):
        members[group].append(i)
    for a, b in combinations(range(p), 2):
        to_b = sorted((table[i][a] - table[i][b], i) for i in members[a])  # those that gain most come first
        to_a = sorted((table[i][b] - table[i][a], i) for i in members[b])
        count = sum(one + other < 0 for (one, _), (other, _) in zip(to_b, to_a, strict=True))
        if count:
            moved = [i for _, i in to_b[:count]], [i for _, i in to_a[:count]]
            members[a] = sorted([i for _, i in to_b[count:]] + moved[1])
            members[b] = sorted([i for _, i in to_a[count:]] + moved[0])
    found = torch.empty_like(groups)
    for group, held in enumerate(members):
        found[held] = group
    return found
