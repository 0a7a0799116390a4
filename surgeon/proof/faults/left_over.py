"""Tensors that B has and should not have, or lacks; and numbers that were all rounded to one side."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surgeon.models.copies import kind_of
from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess
from surgeon.proof.ulps import MOST_SHIFTED, off


class LeftOver(Hypothesis):
    """B holds a tensor under a name that is not expected, or has none under one that is."""

    place = 130

    def guess(self, case: Case) -> Iterator[Guess]:
        if any(kind_of(one) is not kind_of(other) for one, other in _pairs(case)):
            return
        if extra := sorted(case.held.keys() - case.wanted.keys()):
            yield case.guess("extra tensor", f"B has {', '.join(extra[:3])}, which should not be there")
        if missing := sorted(case.wanted.keys() - case.held.keys()):
            yield case.guess("tensor missing", f"B has no {', '.join(missing[:3])}")


def _pairs(case: Case) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(case.expected.modules(), case.found.modules(), strict=False))


class OneSided(Hypothesis):
    """Every number is within one unit of the expected one, and nearly all were moved the same way."""

    place = 140

    def guess(self, case: Case) -> Iterator[Guess]:
        for key, wanted in case.wanted.items():
            held = case.held.get(key)
            if held is None or held.shape != wanted.shape or not wanted.is_floating_point():
                continue
            found = off(held, wanted, {held.dtype}, is_once_rounded=True)
            if found.is_wrong and found.ulps <= 1 and found.shift > MOST_SHIFTED:
                says = f"the numbers of {key} are right to one unit in the last place, but all moved the same way"
                yield case.guess("rounded", f"{says}, as where digits are cut off instead of rounded")
