"""The contract of a question: what `verify` asks of the evidence, the most that it allows, and the sentence it says.

To add a check is to add a file to this folder with one subclass of `Question`. Its docstring says what must hold.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from surgeon.proof.distance import Apart, excess, furthest
from surgeon.proof.evidence import Evidence, Measured, Stepped
from surgeon.proof.report import Asks, Check, Unit

EPS64 = torch.finfo(torch.float64).eps  # what rounding alone does where both sides are computed in float64
ONE_UNIT = "one unit in the last place of every weight"


class Question(abc.ABC):
    """One thing that `verify` asks; its answers are the checks of a report."""

    name: ClassVar[str]  # of its checks; its file is called the same, with underscores
    place: ClassVar[int]  # questions are asked in this order
    asks: ClassVar[Asks] = "mathematics"  # which of the three questions it is a part of
    unit: ClassVar[Unit] = "relative L2"  # of what is measured, and of its limit
    is_for_approximate: ClassVar[bool] = False  # whether it is asked where B was not meant to compute what A does

    @abc.abstractmethod
    def ask(self, evidence: Evidence) -> Iterator[Check]:
        """Answer from what was measured; give nothing if it was not measured."""

    def answer(
        self, found: float, limit: float, says: str, *, noise: float | None = None, unit: Unit | None = None
    ) -> Check:
        """Make the check, which passes if the measured value is within its limit, and the limit excludes something.

        `noise` is what rounding alone does, in the same unit.
        """
        passed = math.isfinite(limit) and found <= limit
        return Check(self.name, found, limit, passed, says, self.asks, unit or self.unit, noise)


def flips_of(pairs: Sequence[tuple[Apart, Apart]], margin: float) -> Iterator[tuple[int, Apart, float]]:
    """Choose the output of which most numbers are other labels, NaN or Inf in B, and say how many may be."""
    limits = [(one.flips, noise.flips_allowed(margin)) for one, noise in pairs]
    for i, flips, limit in furthest([(flips, max(limit, 0.5)) for flips, limit in limits]):  # there is no half of one
        if flips:
            yield i, pairs[i][0], limit


def of_steps(steps: Sequence[Stepped], kind: str, where: str = "") -> Iterator[tuple[float, float, str]]:
    """Give, for every step in which tensors of a kind were compared, the one furthest beyond its limit, in words."""
    for step in steps:
        found = [one for one in step.tensors if one.kind == kind]
        if not found:
            continue
        worst = max(found, key=lambda one: excess(one.found, one.limit))
        wrong = sum(not one.passed for one in found)
        what = f"{len(found)} {kind}{'s' * (len(found) > 1)}{where}"
        says = f"{step.label}: {worst.words}{where}"
        if len(found) > 1:
            says = f"{step.label}: {what}; the furthest is {worst.words}"
        if wrong:
            says = f"{step.label}: {wrong} of {what} {'differ' if wrong > 1 else 'differs'}, most of all {worst.words}"
        says += f": {worst.found:.1e} from that of {worst.against}, at most {worst.limit:.0e}"
        yield worst.found, worst.limit, says


def output_of(run: Measured, output: int) -> str:
    """Begin a sentence about one output: the input, the number of inputs of its kind, and which of several outputs."""
    several = max(len(run.storage), len(run.rounding)) > 1
    words = [run.label, *[f"{run.draws} inputs of it"] * (run.draws > 1), *[f"output {output}"] * several]
    return "".join(f"{word}, " for word in words)
