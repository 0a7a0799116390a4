"""Stretch by stretch: is what B's modules make of A's input explained by how their weights are stored?

For every output channel c of a stretch, in float64 as stored, both on what A's modules were given in its run:

    ‖B(x)_c − A(x)_c‖ ≤ m · max over draws ‖jittered(x)_c − unmoved(x)_c‖ + arithmetic · ‖A(x)‖ / √channels

A jittered stretch is A's or B's with every number moved by a few units in its last place. If both have the same classes
it is one unit, as a cast may move a number; a fold that somebody did in float32 rounds several times. If both have the
same tensors nothing may move but the order of arithmetic. B's own units count, too, since a folded weight may be a
subnormal number, of which one unit is a large part.

A network has inputs on which a fault does not show, such as a ReLU that clips at 100. So modules that are of another
class in B, and hold no weights, are tried on larger numbers, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.models.copies import shadow
from surgeon.proof.distance import Apart, apart, real
from surgeon.proof.recorder import Recorder, Recording, Stretch, leaves, modules_of, run
from surgeon.proof.ulps import Jitter

FEW_UNITS = 4.0  # a float32 fold rounds γ/σ, its product with the weight, and every sum of branches
_DRAWS = 6  # each is one draw of chance; the largest of them is taken
_HOPELESS = 30.0  # times a limit that some draws have set: no further draw makes up for it
_LARGER = (1.0, 1e3)  # factors by which a module without weights is tried on what it is given


@dataclass(frozen=True, slots=True)
class Gap:
    """What was measured at a stretch: relative L2 of its result, the worst of its calls; None if not comparable.

    `isolated`: B's on A's input; `propagated`: each on its own; `excess`: how many times its limit the worst channel
    is, in isolation. `culprit`: the module that is to be named if it is beyond the limit.
    """

    isolated: float | None
    propagated: float | None
    excess: float = 0.0
    culprit: str = ""


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges stretches: `margin` and `arithmetic` are those of the checks, `dtype` is that in which all is stored."""

    own_a: nn.Module  # both as stored, in their own dtype
    own_b: nn.Module
    margin: float
    arithmetic: float
    seed: int
    keeps_dtype: bool

    def gap(self, recorder: Recorder, stretch: Stretch) -> Gap:
        """Measure a stretch, and judge it; if it is beyond its limit, find the step of it that is."""
        gap = measure(recorder, stretch)
        excess = self._excess(recorder, stretch)
        if excess <= 1 or len(stretch.steps) == 1:
            return Gap(gap.isolated, gap.propagated, excess, stretch.path)
        return Gap(gap.isolated, gap.propagated, excess, self._culprit(recorder, stretch))

    def _culprit(self, recorder: Recorder, stretch: Stretch) -> str:
        """Name the step of a stretch that comes after the longest beginning that agrees."""
        for last in range(len(stretch.steps) - 1, 0, -1):
            head = stretch.steps[:last]
            in_a, in_b = ([one for one in side if one in head] for side in (stretch.in_a, stretch.in_b))
            if in_a and in_b and self._excess(recorder, Stretch(stretch.path, head, in_a, in_b)) <= 1:
                return stretch.steps[last]
        return stretch.path

    def _excess(self, recorder: Recorder, stretch: Stretch) -> float:
        sides = [modules_of(recorder.a, stretch.in_a), modules_of(recorder.b, stretch.in_b)]
        calls = recorder.calls(stretch)
        if not _is_same(*sides) and not any(True for side in sides for m in side for _ in _tensors(m)):
            calls = [_scaled(one, by) for by in _LARGER for one in calls]
        return max((self._of_call(sides, stretch, one) for one in calls), default=0.0)

    def _of_call(self, sides: Sequence[Sequence[nn.Module]], stretch: Stretch, one: Recording) -> float:
        expected, found = (run(side, one) for side in sides)
        apart_ = spread(found, expected)
        if apart_ is None:
            return 0.0 if expected is None and found is None else math.inf
        plain = [leaf.limit(self.arithmetic, self.margin, []) for leaf in apart_]
        if max(plain, default=0.0) <= 1:
            return max(plain, default=0.0)
        noise: list[list[Spread]] = []
        excess = math.inf
        for moved in self._moved(sides, stretch, one, (expected, found)):
            noise += [moved] if len(moved) == len(apart_) else []
            limits = [[draw[i] for draw in noise] for i in range(len(apart_))]
            pairs = zip(apart_, limits, strict=True)
            excess = max(leaf.limit(self.arithmetic, self.margin, draws) for leaf, draws in pairs)
            if excess <= 1 or (excess > _HOPELESS and len(noise) >= (1 if _is_same(*sides) else 3)):
                break
        return excess

    def _moved(
        self, sides: Sequence[Sequence[nn.Module]], stretch: Stretch, one: Recording, outs: Sequence[Any]
    ) -> Iterator[list[Spread]]:
        """Measure what moving the numbers of each side does to it, again and again."""
        units = 1.0 if _is_same(*sides) else FEW_UNITS
        own = [modules_of(self.own_a, stretch.in_a), modules_of(self.own_b, stretch.in_b)]
        for draw in range(_DRAWS):
            for modules, out in zip(own, outs, strict=True):
                jitter = Jitter(self.seed + draw, units=units, keeps_dtype=self.keeps_dtype)
                if (moved := spread(run([shadow(module, jitter) for module in modules], one), out)) is not None:
                    yield moved


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a result is from another one: by channel, and in numbers that are not finite or are whole."""

    by_channel: Tensor  # ‖b − a‖ of every channel, (channels,)
    size: float  # ‖a‖
    counted: Apart

    def limit(self, arithmetic: float, margin: float, noise: Sequence[Spread]) -> float:
        """Say how many times what is allowed the worst channel is; `noise` is what moving weights does."""
        shapes = {one.by_channel.shape for one in noise} - {self.by_channel.shape}
        moved = [one.by_channel for one in noise] if not shapes else []
        allowed = torch.full_like(self.by_channel, arithmetic * self.size / math.sqrt(max(1, len(self.by_channel))))
        if moved:
            allowed = allowed + margin * torch.stack(moved).amax(0)
        flips = max((one.counted for one in noise), key=lambda one: one.flips, default=Apart(0.0, 0, 0))
        flips = Apart(0.0, flips.flips, self.counted.count, self.counted.is_whole and bool(noise))
        if self.counted.flips > flips.flips_allowed(margin) or not bool(allowed.isfinite().all()):
            return math.inf
        ratio = torch.where(self.by_channel > 0, self.by_channel / allowed, 0.0)
        return float(ratio.max()) if ratio.numel() else 0.0


def excused(recorder: Recorder, gaps: dict[str, Gap]) -> dict[str, Gap]:
    """Forgive modules inside of a whole, if they have weights and the whole agrees: somebody has folded it in there.

    If it does not agree, they say where.
    """
    found = dict(gaps)
    for whole in recorder.pairing.wholes:
        inside = [path for path in gaps if path in recorder.pairing.inner and path.startswith(f"{whole}.")]
        wrong = [path for path in inside if gaps[path].excess > 1]
        if whole in gaps and gaps[whole].excess > 1 and wrong:
            found[whole] = replace(gaps[whole], culprit=gaps[wrong[0]].culprit)
        for path in wrong if whole in gaps and gaps[whole].excess <= 1 else []:
            stretch = recorder.stretches[path]
            sides = (*modules_of(recorder.a, stretch.in_a), *modules_of(recorder.b, stretch.in_b))
            if any(True for module in sides for _ in _tensors(module)):
                found[path] = replace(gaps[path], excess=0.0)
    return found


def measure(recorder: Recorder, stretch: Stretch) -> Gap:
    """Measure how far B's stretch is from A's in isolation and in its own run, without judging it."""
    modules = modules_of(recorder.b, stretch.in_b)
    isolated = max((_far(run(modules, one), one.out) for one in recorder.calls(stretch)), default=0.0)
    return Gap(_finite(isolated), _finite(recorder.propagated_to(stretch)))


def spread(out: Any, expected: Any) -> list[Spread] | None:
    """Compare two results leaf by leaf; None if they do not match."""
    ours, theirs = leaves(out), leaves(expected)
    if len(ours) != len(theirs) or [type(one) is Tensor for one in ours] != [type(one) is Tensor for one in theirs]:
        return None
    both = [(b, a) for b, a in zip(ours, theirs, strict=True) if isinstance(a, Tensor)]
    if any(b.shape != a.shape for b, a in both):
        return None
    return [_spread(b, a) for b, a in both if a.numel()]


def _spread(b: Tensor, a: Tensor) -> Spread:
    counted = Apart.between(b, a)
    b, a = real(b), real(a)
    if counted.is_whole:
        return Spread(torch.zeros(1, dtype=torch.float64), 0.0, counted)
    b, a = b.double(), a.double()
    is_odd = ~(a.isfinite() & b.isfinite())
    difference, a = (b - a).masked_fill(is_odd, 0.0), a.masked_fill(is_odd, 0.0)
    return Spread(_channels(difference).norm(dim=1), a.norm().item(), counted)


def _channels(tensor: Tensor) -> Tensor:
    """Lay out as (channels, numbers); what has no axis of channels is one channel."""
    return tensor.transpose(0, 1).reshape(tensor.shape[1], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _is_same(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> bool:
    """Whether two stretches are of the same classes, throughout."""
    kinds = [[type(part) for module in side for part in module.modules()] for side in (ours, theirs)]
    return kinds[0] == kinds[1]


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _scaled(one: Recording, by: float) -> Recording:
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t * by if t.is_floating_point() else t, (one.args, one.kwargs)
    )
    return Recording(args, kwargs, one.out)


def _far(out: Any, expected: Any) -> float:
    ours, theirs = leaves(out), leaves(expected)
    if len(ours) != len(theirs):
        return math.inf
    pairs = [(b, a) for b, a in zip(ours, theirs, strict=True) if isinstance(a, Tensor)]
    return max((apart(b, a) if isinstance(b, Tensor) else math.inf for b, a in pairs), default=0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
