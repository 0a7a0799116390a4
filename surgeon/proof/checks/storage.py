"""storage: if no replay proves B, is its distance from A explained by how the weights are stored?"""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.checks.base import Question, flips_of, output_of
from surgeon.proof.distance import EXACT, dtype_name, furthest
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


class Storage(Question):
    """err(B) ≤ m · err(moved) + what another order of arithmetic does, output by output, both in float64.

    err(·) is relative L2 against A. `moved` is the worst of several draws, in which every number of A or B is moved by
    one unit in its last place, and by a few if B has modules of other classes, which somebody has folded. What flips
    (labels, masks) is counted.
    """

    name = "storage"
    place = 30

    def ask(self, evidence: Evidence) -> Iterator[Check]:
        for run in evidence.runs:
            limits = [(found.l2, evidence.margin * noise.l2 + evidence.arithmetic) for found, noise in run.storage]
            for i, found, limit in furthest(limits):
                noise = run.storage[i][1].l2 + evidence.arithmetic
                is_moved = run.storage[i][1].l2 > 0 or evidence.arithmetic < EXACT
                why = f" ({evidence.margin:g} × what rounding the weights does)" if is_moved else ""
                says = (
                    f"{output_of(run, i)}as stored in {dtype_name(evidence.exact)}: relative L2 {found:.1e}, "
                    f"at most {limit:.1e}{why}"
                )
                yield self.answer(found, limit, says, noise=noise)
            for i, one, limit in flips_of(run.storage, evidence.margin):
                says = f"{output_of(run, i)}{one.flips} of {one.count} labels, masks or NaN differ, at most {limit:.0f}"
                yield self.answer(one.flips, limit, says, unit="count")
