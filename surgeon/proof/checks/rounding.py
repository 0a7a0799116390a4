"""rounding: does B round no worse than A in the dtype in which both are stored?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgeon.proof.checks.base import Question, output_of
from surgeon.proof.distance import dtype_name, furthest
from surgeon.proof.report import Check
from surgeon.proof.runs import Evidence


class Rounding(Question):
    """err(B) ≤ m · max(err(A), eps), output by output; err(·) is relative L2 against A in float64."""

    name = "rounding"
    place = 40

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        eps = torch.finfo(evidence.dtype).eps
        for run in evidence.runs:
            limits = [(err_b, evidence.margin * max(err_a, eps)) for err_b, err_a in run.rounding]
            for i, err_b, limit in furthest(limits):
                err_a = run.rounding[i][1]
                unit = f"A's own {err_a:.1e}" if err_a > eps else f"one unit in the last place, A is {err_a:.1e}"
                says = (
                    f"{output_of(run, i)}in {dtype_name(evidence.dtype)}: B is {err_b:.1e} from float64, "
                    f"at most {limit:.1e} ({evidence.margin:g} × {unit})"
                )
                yield self.answer(err_b, limit, says)
