"""Which taps a HetConv has: groups of filters and of channels, and how its taps lie in a kernel.

A pair of filter and channel outside the groups keeps its centre tap only. What that costs is estimated for each pair
alone, as an energy (out, in), and `conv/grouping` looks for groups within which much of it lies:

    in weights           Σ F_ij² over the taps off the centre, v
    in output            vᵀ H_vv v, what the output loses if nothing makes up for it
    after a repair       vᵀ [(H⁻¹)_vv]⁻¹ v, what it loses when the other taps are fitted again: the saliency of
                         Optimal Brain Surgeon (Hassibi & Stork 1993) for a set of taps

where H are the second moments of the patches that the filters see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.conv import grouping

Groups = tuple[Tensor, Tensor]  # the group of every filter and of every channel


def off_centre_energy(weight: Tensor) -> Tensor:
    """The energy that a pair of filter and channel loses with its k×k kernel: (out, in), in float64."""
    taps = weight.detach().double().square()
    return taps.sum((2, 3)) - taps[..., taps.shape[2] // 2, taps.shape[3] // 2]


def fixed_groups(weight: Tensor, p: int) -> dict[str, Groups]:
    """The groups of filters and of channels in the layouts that look at no weights."""
    out, into = (torch.arange(count, device=weight.device) for count in weight.shape[:2])
    return {"block": (out * p // len(out), into * p // len(into)), "interleaved": (out % p, into % p)}


def best_groups(energy: Tensor, p: int) -> Groups:
    """Give the groups within which much energy (out, in) lies; never less than in a layout that looks at no weights."""
    starts = [(rows.cpu(), columns.cpu()) for rows, columns in fixed_groups(energy, p).values()]
    rows, columns = grouping.best_groups(energy, p, starts)
    return rows.to(energy.device), columns.to(energy.device)


def energies(kernel: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Give what each pair of filter and channel loses with its taps off the centre: in weights, then in output.

    `kernel` (out, in, kh, kw) and the second moments of what it sees (in · kh · kw, in · kh · kw), in float64.
    """
    yield off_centre_energy(kernel)
    _, into, kh, kw = kernel.shape
    off = torch.arange(kh * kw, device=kernel.device) != kh // 2 * kw + kw // 2
    taps = kernel.flatten(2)[..., off]  # (out, in, taps)
    yield _form(taps, _blocks(second, into)[:, off][:, :, off])
    ridge = 1e-6 * second.diagonal().mean().clamp_min(torch.finfo(second.dtype).tiny ** 0.5)
    ridged = second.clone()
    ridged.diagonal().add_(ridge)
    inverse = torch.linalg.inv(ridged)
    yield _form(taps, torch.linalg.inv(_blocks(inverse, into)[:, off][:, :, off]))


def kept(groups: Groups, kernel: tuple[int, int]) -> Tensor:
    """Say which taps filters of these groups have: (out, in · kh · kw)."""
    rows, columns = groups
    within = (rows[:, None] == columns)[:, :, None].repeat(1, 1, kernel[0] * kernel[1])
    within[..., kernel[0] // 2 * kernel[1] + kernel[1] // 2] = True
    return within.flatten(1)


def _blocks(matrix: Tensor, count: int) -> Tensor:
    """Take the square blocks on the diagonal: (count, side, side)."""
    side = len(matrix) // count
    return matrix.view(count, side, count, side).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _form(taps: Tensor, matrices: Tensor) -> Tensor:
    """vᵀ M_j v for the taps v of every pair (out, in, taps) and a matrix for every channel (in, taps, taps)."""
    return torch.einsum("oit,itu,oiu->oi", taps, matrices, taps)


def without_diagonal(square: Tensor) -> Tensor:
    """Leave out the diagonal of the first two axes: (p, p, …) → (p, p − 1, …).

    After the first entry, every (p + 1)-th is one of the diagonal.

    >>> without_diagonal(torch.arange(9).view(3, 3))
    tensor([[1, 2],
            [3, 5],
            [6, 7]])
    """
    p, _, *rest = square.shape
    return square.flatten(0, 1)[1:].view(p - 1, p + 1, *rest)[:, :-1].reshape(p, p - 1, *rest)


def with_diagonal(taps: Tensor) -> Tensor:
    """Put zeros on the diagonal: (p, p − 1, …) → (p, p, …).

    >>> with_diagonal(torch.tensor([[1, 2], [3, 5], [6, 7]]))
    tensor([[0, 1, 2],
            [3, 0, 5],
            [6, 7, 0]])
    """
    p, _, *rest = taps.shape
    rows = taps.reshape(p - 1, p, *rest)
    rows = torch.cat([rows, rows.new_zeros(p - 1, 1, *rest)], 1).flatten(0, 1)
    return torch.cat([rows.new_zeros(1, *rest), rows]).view(p, p, *rest)
