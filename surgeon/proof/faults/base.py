"""The contract of a hypothesis: one kind of fault that would explain how B differs from what is expected.

To add a kind is to add a file to this folder with one subclass of `Hypothesis`. Its docstring says what is tried.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import ClassVar

from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess


class Hypothesis(abc.ABC):
    """Something that may have gone wrong; it guesses only what explains the whole difference."""

    place: ClassVar[int]  # hypotheses are tried in this order, and the first that explains the difference is told

    @abc.abstractmethod
    def guess(self, case: Case) -> Iterator[Guess]:
        """Give the fault in words, with the evidence; nothing if this is not what happened."""


def close(residual: float) -> str:
    """Say in words how near to B something is."""
    return "exactly" if residual == 0 else f"to {residual:.0e}"
