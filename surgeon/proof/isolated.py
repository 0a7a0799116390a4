"""Stretch by stretch: is what B's modules make of A's input explained by how their weights are stored?

For every output channel c of a stretch, in float64 as stored, both on what A's modules were given in its run:

    ‖B(x)_c − A(x)_c‖ ≤ m · max over draws ‖jittered(x)_c − unmoved(x)_c‖ + arithmetic · ‖A(x)‖ / √channels

A jittered stretch is A's or B's with every number moved by a few units in its last place. If the tensors are A's to one
unit it is one, as a cast may move a number; a fold that somebody did in float32 rounds several times. If both have the
same tensors nothing is moved, and only the order of arithmetic may differ. B's own units count, too, since a folded
weight may be a subnormal number, of which one unit is a large part.

If a stretch is beyond its limit, and one after it has other tensors, too, and makes good for it to a thirtieth or less,
they were rewritten together: channels in another order, a scale that was moved into the next layer. Then they are one.

A network has inputs on which a fault does not show, such as a ReLU that clips at 100. So modules that are of another
class in B, and hold no weights, are tried on larger numbers, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.models.copies import shadow
from surgeon.proof.distance import Apart, are_finite, real
from surgeon.proof.recorder import Recorder, Recording, Stretch, draws_nothing, far_apart, leaves, modules_of, run
from surgeon.proof.ulps import Jitter, off

FEW_UNITS = 4.0  # a float32 fold rounds γ/σ, its product with the weight, and every sum of branches
_OF_HALVES = 3.0  # fewer in half types, where m is larger, and which are mostly folded in float32 and cast
_DRAWS = 6  # each is one draw of chance; the largest of them is taken
_HOPELESS = 30.0  # times a limit that some draws have set: no further draw makes up for it
_MADE_GOOD = 30.0  # times smaller is the distance behind modules that make good for it
_MOST_STEPS = 4  # modules that make good for each other, beyond those of a stretch
_OTHER_CODE = 1e-6  # relative L2: another class may compute in float32 with the same tensors
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
    """Judges stretches by the margin and the arithmetic of the checks.

    `keeps_dtype`: the models run in their own dtype only, so their copies with moved numbers do, too.
    """

    own_a: nn.Module  # both as stored, in their own dtype
    own_b: nn.Module
    margin: float
    arithmetic: float
    seed: int
    is_alike: Callable[[Recorder, Stretch], bool]  # whether it is certain that B's computes what A's does
    keeps_dtype: bool

    def gaps(self, recorder: Recorder) -> dict[str, Gap]:
        """Measure all stretches in order of execution, and judge them; some become one on the way."""
        found: dict[str, Gap] = {}
        for path in list(recorder.stretches):
            if path in recorder.stretches:
                found[path] = self._gap(recorder, recorder.stretches[path])
        return excused(recorder, found)

    def _gap(self, recorder: Recorder, stretch: Stretch) -> Gap:
        """Measure a stretch, and judge it; if it is beyond its limit, find the step of it that is."""
        if self.is_alike(recorder, stretch):
            return replace(measure(recorder, stretch, is_alike=True), culprit=stretch.path)
        results = [run(modules_of(recorder.b, stretch.in_b), one) for one in recorder.calls(stretch)]
        gap = measure(recorder, stretch, results)
        excess = self._excess(recorder, stretch, results)
        del results
        if excess <= 1:
            return replace(gap, excess=excess, culprit=stretch.path)
        far, longer = math.inf if gap.isolated is None else gap.isolated, stretch
        for _ in range(_MOST_STEPS):
            if (further := recorder.longer(longer)) is None:
                break
            last, longer = further.in_a[len(longer.in_a) :], further
            made = measure(recorder, longer)
            is_good = made.isolated is not None and made.isolated * _MADE_GOOD <= far and far > 0
            if is_good and self._is_rewritten(recorder, last) and (left := self._excess(recorder, longer)) <= 1:
                recorder.merge(longer)
                return replace(made, excess=left, culprit=stretch.path)
        return replace(gap, excess=excess, culprit=self._culprit(recorder, stretch))

    def _is_rewritten(self, recorder: Recorder, paths: Sequence[str]) -> bool:
        """Whether modules have other tensors in B; what was not changed makes good for nothing, it only looks away."""
        stretch = recorder.stretch("", paths)
        sides = (modules_of(self.own_a, stretch.in_a), modules_of(self.own_b, stretch.in_b))
        return _units(*sides) == FEW_UNITS

    def _culprit(self, recorder: Recorder, stretch: Stretch) -> str:
        """Name the step of a stretch that comes after the longest beginning that agrees."""
        for last in range(len(stretch.steps) - 1, 0, -1):
            head = recorder.stretch(stretch.path, stretch.steps[:last])
            if head.in_a and head.in_b and self._excess(recorder, head) <= 1:
                return stretch.steps[last]
        return stretch.path

    def _excess(self, recorder: Recorder, stretch: Stretch, results: Sequence[Any] | None = None) -> float:
        """Say how many times its limit a stretch is; `results` are those of B on what A's was given, if they are known.

        What A's modules give on it was recorded. They are run again where they may draw random numbers.
        """
        sides = [modules_of(recorder.a, stretch.in_a), modules_of(recorder.b, stretch.in_b)]
        calls = recorder.calls(stretch)
        is_plain = all(map(draws_nothing, sides[0]))
        if results is None:
            results = [run(sides[1], one) for one in calls]
        worst = 0.0
        for one, found in zip(calls, results, strict=True):
            expected = one.out if is_plain else run(sides[0], one)
            worst = max(worst, self._of_call(sides, stretch, one, (expected, found)))
        if not _is_same(*sides) and not any(True for side in sides for m in side for _ in _tensors(m)):
            for one in (_scaled(one, by) for by in _LARGER if by != 1 for one in calls):
                worst = max(worst, self._of_call(sides, stretch, one, (run(sides[0], one), run(sides[1], one))))
        return worst

    def _of_call(
        self, sides: Sequence[Sequence[nn.Module]], stretch: Stretch, one: Recording, outs: tuple[Any, Any]
    ) -> float:
        expected, found = outs
        apart_ = spread(found, expected)
        if apart_ is None:
            return 0.0 if expected is None and found is None else math.inf
        own = [modules_of(self.own_a, stretch.in_a), modules_of(self.own_b, stretch.in_b)]
        units = _units(*own)
        arithmetic = self.arithmetic if units or _is_same(*own) else max(self.arithmetic, _OTHER_CODE)
        excess = max((leaf.limit(arithmetic, self.margin, []) for leaf in apart_), default=0.0)
        if excess <= 1 or not units:
            return excess
        noise: list[list[Spread]] = []
        for moved in self._moved(own, units, one, (expected, found)):
            noise += [moved] if len(moved) == len(apart_) else []
            limits = [[draw[i] for draw in noise] for i in range(len(apart_))]
            pairs = zip(apart_, limits, strict=True)
            excess = max(leaf.limit(self.arithmetic, self.margin, draws) for leaf, draws in pairs)
            if excess <= 1 or (excess > _HOPELESS and len(noise) >= (1 if _is_same(*sides) else 3)):
                break
        return excess

    def _moved(
        self, own: Sequence[Sequence[nn.Module]], units: float, one: Recording, outs: Sequence[Any]
    ) -> Iterator[list[Spread]]:
        """Measure what moving the numbers of each side does to it, again and again."""
        for draw in range(_DRAWS):
            for modules, out in zip(own, outs, strict=True):
                most = _OF_HALVES if self.margin > 2 else FEW_UNITS
                jitter = Jitter(self.seed + draw, units=min(units, most), keeps_dtype=self.keeps_dtype)
                if (moved := spread(run([shadow(module, jitter) for module in modules], one), out)) is not None:
                    yield moved


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a result is from another one: by channel, and in numbers that are not finite or are whole.

    Which axis holds the channels is not known: it is the second one or the last, and both are looked at.
    """

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


def measure(
    recorder: Recorder, stretch: Stretch, results: Sequence[Any] | None = None, *, is_alike: bool = False
) -> Gap:
    """Measure how far B's stretch is from A's in isolation and in its own run, without judging it.

    `results` are those of B on what A's was given, if they are known; what is alike need not be run.
    """
    propagated = _finite(recorder.propagated_to(stretch))
    if is_alike:
        return Gap(0.0, propagated)
    modules = modules_of(recorder.b, stretch.in_b)
    calls = recorder.calls(stretch)
    outs = (run(modules, one) for one in calls) if results is None else results
    isolated = max((far_apart(out, one.out) for out, one in zip(outs, calls, strict=True)), default=0.0)
    return Gap(_finite(isolated), propagated)


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
    difference = b - a
    if not are_finite(a, b):
        is_odd = ~(a.isfinite() & b.isfinite())
        difference, a = difference.masked_fill(is_odd, 0.0), a.masked_fill(is_odd, 0.0)
    axes = {1, a.dim() - 1} if a.dim() > 1 else {0}
    norms = [difference.transpose(0, axis).reshape(a.shape[axis], -1).norm(dim=1) for axis in sorted(axes)]
    return Spread(torch.cat(norms) if a.dim() > 1 else difference.norm()[None], a.norm().item(), counted)


def _is_same(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> bool:
    """Whether two stretches are of the same classes, throughout."""
    kinds = [[type(part) for module in side for part in module.modules()] for side in (ours, theirs)]
    return kinds[0] == kinds[1]


def _units(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> float:
    """By how many units rounding may have moved the numbers: none if they are equal, one, or a few."""
    mine, other = ([dict(_named(module)) for module in side] for side in (ours, theirs))
    if [held.keys() for held in mine] != [held.keys() for held in other]:
        return FEW_UNITS
    pairs = [(one[key], two[key]) for one, two in zip(mine, other, strict=True) for key in one]
    if any(one.dtype != two.dtype for one, two in pairs):
        return FEW_UNITS
    furthest = max((off(two, one, {one.dtype}).ulps for one, two in pairs), default=0.0)
    return 0.0 if furthest == 0 else 1.0 if furthest <= 1 and _is_same(ours, theirs) else FEW_UNITS


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give a module's tensors, without counters, which decide nothing."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.endswith("num_batches_tracked"):
            yield name, tensor


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _scaled(one: Recording, by: float) -> Recording:
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t * by if t.is_floating_point() else t, (one.args, one.kwargs)
    )
    return Recording(args, kwargs, one.out)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
