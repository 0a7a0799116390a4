"""Channels in another order: filters, the channels that they read, or whole groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_MOST = 4096  # channels whose order is looked for


class Permuted(Hypothesis):
    """With the filters, or the channels that they read, in another order, the expected tensors are B's."""

    place = 80

    def guess(self, case: Case) -> Iterator[Guess]:
        large = [key for key, (wanted, _) in case.off.items() if wanted.dim() >= 2]
        for key in large[:1]:
            wanted, held = case.off[key]
            for axis, what in ((0, "output"), (1, "input")):
                order = _order(wanted.transpose(0, axis), held.double().transpose(0, axis))
                if order is None:
                    continue
                residual = case.changed(lambda one, axis=axis, order=order: _permuted(one, axis, order))  # type: ignore[misc]
                if residual is not None:
                    says = f"{what} channels of {key} lie in another order ({_in_words(order)})"
                    yield case.guess(
                        "channels permuted", f"{says}: so the expected one is B's {close(residual)}", residual
                    )


def _order(wanted: Tensor, held: Tensor) -> Tensor | None:
    """Find for every row of what is held the expected one that is nearest to it; None if that is no other order."""
    count = len(wanted)
    if not 1 < count <= _MOST or not bool(held.isfinite().all()):
        return None
    one, other = wanted.reshape(count, -1), held.reshape(count, -1)
    near = (other - one).norm(dim=1) <= 1e-2 * one.norm(dim=1)
    order = torch.arange(count)
    rows = (~near).nonzero().flatten()
    if len(rows) < 2:
        return None
    order[rows] = rows[torch.cdist(other[rows], one[rows]).argmin(1)]
    return order if len(set(order.tolist())) == count else None


def _permuted(tensor: Tensor, axis: int, order: Tensor) -> Tensor | None:
    if tensor.dim() <= axis or tensor.shape[axis] != len(order):
        return None
    return tensor.index_select(axis, order)


def _in_words(order: Tensor) -> str:
    count = len(order)
    moved = (order != torch.arange(count)).nonzero().flatten().tolist()
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} are exchanged"
    by = int(order[0])
    if torch.equal(order, (torch.arange(count) + by) % count):
        return f"all are moved on by {count - by}"
    return f"{len(moved)} of {count} are not in their place"
