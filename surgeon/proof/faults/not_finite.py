"""Numbers that are none: NaN or infinite where a finite one is expected."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess


class NotFinite(Hypothesis):
    """A tensor of B, or what it gives, holds NaN or Inf where the expected one does not."""

    place = 10

    def guess(self, case: Case) -> Iterator[Guess]:
        for key, (wanted, held) in case.off.items():
            odd = int((~held.isfinite() & wanted.isfinite()).sum())
            if odd:
                says = f"{odd} of the {held.numel()} numbers of {key} are NaN or infinite, and should be finite"
                yield case.guess("not finite", says)
        for wanted, found in case.maps() if not case.off else ():
            if wanted.is_floating_point() and (odd := int((~found.isfinite() & wanted.isfinite()).sum())):
                yield case.guess(
                    "not finite", f"{odd} numbers of what B gives are NaN or infinite, and its weights not"
                )
