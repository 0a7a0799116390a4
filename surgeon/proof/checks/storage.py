"""storage: if no replay proves B, is its distance from A explained by how the weights are stored?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import ONE_UNIT, Question, output_of
from surgeon.proof.distance import dtype_name, furthest
from surgeon.proof.report import Check
from surgeon.proof.runs import Evidence


class Storage(Question):
    """err(B) ≤ m · err(jittered A) + what another order of arithmetic does, output by output, both in float64.

    err(·) is relative L2 against A. Jittered A is A with each number moved by half a unit in its last place (by a
    whole one in float64, and if A runs only in its own dtype, in which it is then measured).
    """

    name = "storage"
    place = 30

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        what = "rounding every weight once more" if evidence.exact != evidence.dtype else ONE_UNIT
        for run in evidence.runs:
            limits = [(found, evidence.margin * jitter + evidence.arithmetic) for found, jitter in run.storage]
            for i, found, limit in furthest(limits):
                says = (
                    f"{output_of(run, i)}as stored in {dtype_name(evidence.exact)}: relative L2 {found:.1e}, "
                    f"at most {limit:.1e} ({evidence.margin:g} × what {what} does)"
                )
                yield self.answer(found, limit, says)
