"""A kernel that is transposed, mirrored, turned or moved; a strip of k×1 in the place of 1×k."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from surgeon.proof.distance import relative_l2
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_CHANGES: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("kernel transposed", "transposed", lambda k: k.mT),
    ("kernel mirrored", "mirrored from left to right", lambda k: k.flip(3)),
    ("kernel mirrored", "mirrored from top to bottom", lambda k: k.flip(2)),
    ("kernel mirrored", "turned by 180°, as for a convolution instead of a correlation", lambda k: k.flip(2, 3)),
    ("kernel mirrored", "turned by 90° to the left", lambda k: k.rot90(1, (2, 3))),
    ("kernel mirrored", "turned by 90° to the right", lambda k: k.rot90(-1, (2, 3))),
    ("kernel shifted", "one row lower", lambda k: k.roll(1, 2)),
    ("kernel shifted", "one row higher", lambda k: k.roll(-1, 2)),
    ("kernel shifted", "one column to the right", lambda k: k.roll(1, 3)),
    ("kernel shifted", "one column to the left", lambda k: k.roll(-1, 3)),
)


class Turned(Hypothesis):
    """With its kernels turned, mirrored or moved, the expected tensor is B's."""

    place = 75

    def guess(self, case: Case) -> Iterator[Guess]:
        if case.off and all(wanted.dim() == 4 for wanted, _ in case.off.values()):
            for kind, words, change in _CHANGES:
                residual = case.changed(lambda one, change=change: _kept(one, change(one)))  # type: ignore[misc]
                if residual is not None:
                    says = f"with its kernels {words}, the expected {', '.join(case.off)} is B's {close(residual)}"
                    yield case.guess(kind, says, residual)
        for key, wanted in case.wanted.items():
            held = case.held.get(key)
            if wanted.dim() != 4 or held is None or not held.shape != wanted.shape == held.mT.shape:
                continue
            if (residual := relative_l2(held.mT, wanted)) <= case.limit:
                says = f"with its strip transposed, the expected {key} is B's {close(residual)}"
                yield case.guess("strip transposed", says, residual)


def _kept(before: Tensor, after: Tensor) -> Tensor | None:
    return after if after.shape == before.shape else None
