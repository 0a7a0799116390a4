"""rounding: does B's arithmetic round no worse than A's in the dtype in which both are stored?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgeon.proof.checks.base import Question, flips_of, output_of
from surgeon.proof.distance import dtype_name, furthest
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check

_FLOOR = 4  # units: what any arithmetic may do


class Rounding(Question):
    """err(B) ≤ m · max(err(A), 4 · eps), output by output; err(·) is relative L2 against the same model in float64.

    In place of err(A) stands what one unit in the last place of B's weights does to B, if that is more.

    The rounding of stored weights is no part of this: both runs of a model use the same ones.
    """

    name = "rounding"
    place = 40
    asks = "arithmetic"

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        floor = _FLOOR * torch.finfo(evidence.dtype).eps
        dtype = dtype_name(evidence.dtype)
        for run in evidence.runs:
            limits = [(b.l2, evidence.margin * max(a.l2, floor)) for b, a in run.rounding]
            for i, err_b, limit in furthest(limits):
                err_a = run.rounding[i][1].l2
                unit = (
                    f"A's, or one unit of B's weights: {err_a:.1e}"
                    if err_a > floor
                    else f"{_FLOOR} units in the last place, A: {err_a:.1e}"
                )
                says = (
                    f"{output_of(run, i)}in {dtype}: B is {err_b:.1e} from itself in float64, "
                    f"at most {limit:.1e} ({evidence.margin:g} × {unit})"
                )
                yield self.answer(err_b, limit, says, noise=limit / evidence.margin)
            for i, one, limit in flips_of(run.rounding, evidence.margin):
                flips = f"{one.flips} of {one.count} labels, masks or NaN"
                says = f"{output_of(run, i)}in {dtype}: {flips} are not those of B in float64, at most {limit:.0f}"
                yield self.answer(one.flips, limit, says, unit="count")
