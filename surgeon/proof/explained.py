"""What rounding explains, and what it does not: of the replay's distance from A, of B's, and of the arithmetic of both.

Numbers are moved by units in their last place, again and again, because it is chance what one draw does; the largest of
the draws is taken. One draw that explains a distance is enough: further ones would only allow more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.models.call import Inputs
from surgeon.proof import in_common
from surgeon.proof.calls import evaluating
from surgeon.proof.distance import EXACT, Apart, as_double, excess, furthest, is_matched, largest, pooled
from surgeon.proof.evidence import Exactness
from surgeon.proof.held import Held
from surgeon.proof.recorder import Recorder
from surgeon.proof.site_by_site import CLEAR, site_by_site
from surgeon.proof.ulps import Jitter

_SHAKES = 4  # times that weights are moved, because it is chance whether two near numbers change places
_HOPELESS = 30.0  # times a limit that two draws have set: no further one makes up for it


@dataclass(frozen=True, slots=True)
class InOwn:
    """Results of A and B in their own dtype: for every draw, and (B's, A's) for the input as the user gave it.

    `is_cut`: those of the draws were cut out of the results of a batch.
    """

    a: list[Any]
    b: list[Any]
    whole: tuple[Any, Any]
    is_cut: bool = False


class Explained(Held):
    """Measures distances, and what moving numbers does to them."""

    def exactness(
        self,
        inputs: Inputs,
        outs: tuple[Any, Any],
        recorder: Recorder,
        *,
        is_flat: bool = False,
        rounding: Sequence[tuple[Apart, Apart]] = (),
    ) -> Exactness | None:
        """Compare the outputs of the replay with A's; if A is flat or ill-conditioned there, its blocks, too.

        `outs` are those of A and B. If its sites are clearly A's, the replay need not be run as a whole: the input that
        surgeon draws does that.
        """
        if self.replay is None:
            return None
        replay, truth = self.replay, outs[0]
        if not self.is_double:
            return Exactness(None, blocks=recorder.blocks_apart(self.double_a, replay))
        if not is_flat and (apart := self._sites_apart(outs, recorder, rounding)) is not None:
            return Exactness(apart)
        out = self.call(replay, inputs, torch.float64)
        if is_matched(out, truth):
            found = pooled([out], [truth])
            if all(one.l2 <= EXACT and not one.flips for one in found):
                blocks = recorder.blocks_apart(self.a, replay) if is_flat else None
                return Exactness(max(one.l2 for one in found), blocks=blocks)
        blocks = recorder.blocks_apart(self.a, replay)
        shaken = [evaluating(self.a, Jitter(self.seed + i)) for i in range(_SHAKES)]
        moved = [self.call(model, inputs, torch.float64) for model in shaken]
        if not all(is_matched(one, truth) for one in (out, *moved)):
            return Exactness(None, blocks=blocks)
        noise = largest([pooled([one], [truth]) for one in moved])
        limits = [
            (one.l2 if one.flips <= most.flips_allowed(self.margin) else torch.inf, max(EXACT, self.margin * most.l2))
            for one, most in zip(pooled([out], [truth]), noise, strict=True)
        ]
        _, worst_found, limit = next(furthest(limits))
        return Exactness(worst_found, limit, blocks)

    def _sites_apart(
        self, outs: tuple[Any, Any], recorder: Recorder, rounding: Sequence[tuple[Apart, Apart]]
    ) -> float | None:
        """Measure the replay at the sites alone; None where that does not settle what its outputs are."""
        truth, out_b = outs
        if not (self.replay is not None and self.is_probed and self.is_built_alike and rounding) or self.was_cast:
            return None
        unit = torch.finfo(self.dtype).eps / 2
        spread = max(1.0, *(a.l2 / unit for _, a in rounding))
        found = pooled([out_b], [truth]) if is_matched(out_b, truth) else []
        if not found or any(one.flips or one.l2 > 16 * spread * unit for one in found):
            return None  # B, which is built as the replay, does not follow A
        apart = site_by_site(recorder, self.replay, self.unlike)
        return apart if apart is not None and apart * spread <= CLEAR * EXACT else None

    def storage(
        self, outs_b: Sequence[Any], truths: Sequence[Any], draws: Sequence[Inputs]
    ) -> list[tuple[Apart, Apart]]:
        """Measure how far B's outputs are from A's, and, if that is more than nothing, what moving weights does."""
        found = pooled(outs_b, truths)
        if all(one.l2 <= self.arithmetic and not one.flips for one in found):
            return [(one, Apart(0.0, 0, one.count, one.is_whole)) for one in found]
        units = in_common.units(self.own_a, self.own_b)  # by which numbers may have been moved
        if not units:
            return [(one, Apart(0.0, 0, one.count)) for one in found]
        if len(self.noise) == len(found) and self._is_explained(found, self.noise):
            return list(zip(found, self.noise, strict=True))  # as for the first input
        noise = [Apart(0.0, 0, one.count, one.is_whole) for one in found]
        sides = [(self.own_a, truths), (self.own_b, outs_b), *[(self.own_a, truths)] * (_SHAKES - 1)]
        for i, (model, outs) in enumerate(sides):
            keeps, still = not self.is_double, self.still_for(draws[0])
            moved = evaluating(model, Jitter(self.seed + i, units=units, keeps_dtype=keeps, still=still))
            noise = largest([noise, pooled([self.call(moved, one, self.exact) for one in draws], outs)])
            limits = [self.margin * most.l2 + self.arithmetic for most in noise]
            worst_of = max(excess(one.l2, limit) for one, limit in zip(found, limits, strict=True))
            if self._is_explained(found, noise) or (i and worst_of > _HOPELESS):
                break
        self.noise = noise
        return list(zip(found, noise, strict=True))

    def _is_explained(self, found: Sequence[Apart], noise: Sequence[Apart]) -> bool:
        pairs = list(zip(found, noise, strict=True))
        is_near = all(excess(one.l2, self.margin * most.l2 + self.arithmetic) <= 1 for one, most in pairs)
        return is_near and all(one.flips <= most.flips for one, most in pairs)

    def rounding(
        self, run: InOwn, outs_b: Sequence[Any], truths: Sequence[Any], draws: Sequence[Inputs]
    ) -> list[tuple[Apart, Apart]]:
        """Compare each model with itself in float64; B may be as far as one unit in its weights moves it.

        Folding leaves fewer steps, and larger numbers in them: a huge bias, say, or scales that are far apart.
        """
        found, noise = pooled(run.b, outs_b), pooled(run.a, truths)
        least = 4 * torch.finfo(self.dtype).eps
        if run.is_cut and any(one.l2 > least or one.flips for one in (*found, *noise)):
            # what the others of a batch do to an image, if anything, must not count as rounding
            a, b = ([self.call(model, one, self.dtype) for one in draws] for model in (self.own_a, self.own_b))
            found, noise = pooled(b, outs_b), pooled(a, truths)
        for i in range(_SHAKES):
            pairs = list(zip(found, noise, strict=True))
            is_near = all(one.l2 <= self.margin * max(most.l2, least) for one, most in pairs)
            if is_near and all(one.flips <= most.flips_allowed(self.margin) for one, most in pairs):
                break
            moved = evaluating(self.own_b, Jitter(self.seed + i, units=1.0))
            outs = pooled([self.call(moved, one, self.exact) for one in draws], outs_b)
            noise = [one.furthest(other) for one, other in zip(noise, outs, strict=True)]
        return list(zip(found, noise, strict=True))

    def own_truths(self, truths: list[Any], draws: Sequence[Inputs]) -> list[Any]:
        """Run A in float64 as it is in its own dtype, which is another A where it was cast."""
        as_stored = evaluating(self.own_a, as_double) if self.was_cast else None
        return truths if as_stored is None else [self.call(as_stored, one, self.exact) for one in draws]
