"""The models in their dtypes, one run of both on one input, and what was measured: the evidence that the checks judge.

A model with few outputs is run on more inputs of that kind, because the error of one number says nothing: two correct
roundings of one number differ by more than a factor of two in three of ten cases.

The `margin` m is 2, and 3 for half types. No flat tolerance is right, since a deep network in bfloat16 is 20 % away
from its own float64 result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis.run import how_to_call
from surgeon.conv.spec import ConvSpec
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.devices import dtype_of
from surgeon.models.sandbox import one_thread, quietly
from surgeon.proof.distance import (
    EXACT,
    apart,
    as_double,
    dtype_name,
    furthest,
    is_matched,
    matched,
    pooled,
    tensors,
    worst,
)
from surgeon.proof.figures import figures
from surgeon.proof.recorder import Gap, Recorder, is_site
from surgeon.proof.report import Distance
from surgeon.proof.ulps import Jitter

ENOUGH = 64  # numbers are needed to measure a rounding error; two correct ones then differ by m once in 50,000 cases
_SHAKES = 4  # times that weights are moved, because it is chance whether two near numbers change places
_ARITHMETIC = 64  # units: relative L2 by which two runs may differ through their order of arithmetic alone


@dataclass(frozen=True, slots=True)
class Replay:
    """B made anew from A: in float64 throughout, and with every tensor rounded between two operations, as in files."""

    exact: nn.Module
    rounded: nn.Module


@dataclass(frozen=True, slots=True)
class Exactness:
    """How far the replay is from A in float64: its outputs, and its blocks where outputs alone cannot tell."""

    outputs: float | None  # the one that is furthest beyond its limit; None where A does not run in float64
    limit: float = EXACT
    blocks: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured for one input."""

    label: str  # of the input
    distance: Distance | None  # None where the shapes of outputs depend on rounding
    exact: Exactness | None  # replay against A
    modules: float | None  # B against the replay with B's tensors, in float64 if A runs there
    storage: list[tuple[float, float]]  # output by output: B, and jittered A, against A; not where a replay proves B
    rounding: list[tuple[float, float]]  # output by output: B, and A, in their own dtype against A in float64
    draws: int  # how many inputs of this kind `storage` and `rounding` were measured on
    sites: dict[str, Gap]
    odd: int  # outputs of B that hold NaN or Inf
    blank: int  # outputs of A in which no number is finite


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured, and the numbers from which the limits are computed."""

    runs: tuple[Measured, ...]  # one for each input
    ulps: Mapping[str, float] | None  # stored tensor → units in the last place from the replay's; None without a replay
    dtype: torch.dtype  # in which both models are stored
    exact: torch.dtype  # in which they were compared as stored: float64 if A runs there
    margin: float
    arithmetic: float  # relative L2 in `exact` by which two runs may differ through their order alone


class NotInFloat64Error(Exception):
    """A runs in its own dtype, and not in float64; the message says why not."""


class Models:
    """The models in their dtypes and in `exact`, which is float64 if A runs there; and the sites that they share."""

    def __init__(self, a: nn.Module, b: nn.Module, replay: Replay | None, seed: int, exact: torch.dtype) -> None:
        self.dtype, self.exact, self.seed = dtype_of(a), exact, seed
        self.own_a, self.own_b = _evaluating(a), _evaluating(b)
        self.double_a = _evaluating(a, as_double)
        is_double = exact == torch.float64
        self.a, self.b = (self.double_a, _evaluating(b, as_double)) if is_double else (self.own_a, self.own_b)
        needs_jitter = replay is None or not is_double
        self.jittered = _evaluating(a, Jitter(seed, keeps_dtype=not is_double)) if needs_jitter else None
        self.replay = _evaluating(replay.exact) if replay is not None else None
        self.twin = _with_tensors_of(self.b, self.replay) if self.replay is not None else None
        self.margin = 2.0 if self.dtype in (torch.float32, torch.float64) else 3.0
        self.kinds = {
            path: (type(module).__name__, type(others[path]).__name__)
            for others in [dict(b.named_modules())]
            for path, module in a.named_modules()
            if path in others and is_site(module) and is_site(others[path])
        }

    def evidence(self, inputs: Sequence[Inputs], ulps: Mapping[str, float] | None) -> Evidence:
        """Run both models on every input.

        Raises:
            NotInFloat64Error: A should be compared in float64, but runs only in its own dtype.
            VerifyError: the outputs differ in structure, shape or dtype, or a model does not run.
        """
        runs = tuple(self._run(one) for one in inputs)
        return Evidence(runs, ulps, self.dtype, self.exact, self.margin, _ARITHMETIC * torch.finfo(self.exact).eps)

    def _run(self, inputs: Inputs) -> Measured:
        recorder = Recorder(self.a, self.b, self.kinds)
        with recorder.recording(self.a):
            truth = self._truth(inputs)
        with recorder.comparing(self.b):
            out_b = self._call(self.b, inputs, self.exact)
        if self.replay is None:
            matched(out_b, truth)  # raises if the outputs cannot be compared
        more = self._more(inputs, truth)
        draws = [inputs, *more]
        truths = [truth, *(self._call(self.a, one, self.exact) for one in more)]
        owns = [[self._call(model, one, self.dtype) for one in draws] for model in (self.own_a, self.own_b)]
        is_steady = is_matched(out_b, truth) and all(map(is_matched, [*owns[0], *owns[1]], [*truths, *truths]))
        if not is_steady and self.jittered is not None:
            raise VerifyError(
                f"the shapes of the outputs depend on rounding: in {dtype_name(self.dtype)} "
                "they differ from those in float64",
                todo="Compare the part of the network that comes before its thresholds.",
            )
        found = [t for t in tensors(truth) if t.is_floating_point() and t.numel()]
        return Measured(
            label=str(inputs),
            distance=self._distance(inputs, (out_b, truth), (owns[1][0], owns[0][0])) if is_steady else None,
            exact=None if self.replay is None else self._exactness(self.replay, inputs, truth, recorder),
            modules=None if self.twin is None else worst(out_b, self._call(self.twin, inputs, self.exact)),
            storage=self._storage(out_b, more, truths, draws),
            rounding=_against(owns[1], owns[0], truths) if is_steady and self.dtype != self.exact else [],
            draws=len(draws),
            sites=recorder.gaps(self.b, self.jittered),
            odd=sum(not t.isfinite().all() for t in tensors(owns[1][0]) if t.is_floating_point()),
            blank=sum(not t.isfinite().any() for t in found),
        )

    def _truth(self, inputs: Inputs) -> Any:
        try:
            return self._call(self.a, inputs, self.exact)
        except VerifyError as error:
            if self.exact == self.dtype:
                raise
            self._call(self.own_a, inputs, self.dtype)  # if that does not run either, the input is wrong
            raise NotInFloat64Error(where(error.__cause__ or error)) from error

    def _exactness(self, replay: nn.Module, inputs: Inputs, truth: Any, recorder: Recorder) -> Exactness:
        """Compare the outputs of the replay with A's; if A is ill-conditioned there, compare its blocks, too."""
        if self.exact != torch.float64:
            return Exactness(None, blocks=recorder.blocks_apart(self.double_a, replay))
        out = self._call(replay, inputs, torch.float64)
        if is_matched(out, truth) and (found := worst(out, truth)) <= EXACT:
            return Exactness(found)
        shaken = [_evaluating(self.a, Jitter(self.seed + i)) for i in range(_SHAKES)]
        moved = [self._call(model, inputs, torch.float64) for model in shaken]
        if not all(is_matched(one, truth) for one in moved):
            return Exactness(math.inf, math.inf, recorder.blocks_apart(self.a, replay))
        largest = [max(one) for one in zip(*(pooled([one], [truth]) for one in moved), strict=True)]
        limits = [min(max(EXACT, self.margin * one), 1e300) for one in largest]
        _, found, limit = next(furthest(list(zip(pooled([out], [truth]), limits, strict=True))))
        return Exactness(found, limit, recorder.blocks_apart(self.a, replay))

    def _distance(self, inputs: Inputs, exact: tuple[Any, Any], own: tuple[Any, Any]) -> Distance:
        return figures(str(inputs), exact if self.exact == torch.float64 else None, own)

    def _storage(
        self, out_b: Any, more: Sequence[Inputs], truths: Sequence[Any], draws: Sequence[Inputs]
    ) -> list[tuple[float, float]]:
        if self.jittered is None:
            return []
        outs_b = [out_b, *(self._call(self.b, one, self.exact) for one in more)]
        return _against(outs_b, [self._call(self.jittered, one, self.exact) for one in draws], truths)

    def _more(self, inputs: Inputs, truth: Any) -> list[Inputs]:
        """Draw further inputs of the kind, until every output has enough numbers to measure its rounding."""
        fewest = min((t.numel() for t in tensors(truth) if t.numel()), default=ENOUGH)
        is_judged = self.dtype != torch.float64 or self.jittered is not None
        return inputs.alike(-(-ENOUGH // fewest) - 1, self.seed) if is_judged else []

    def _call(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Any:
        return _call(model, inputs, dtype, self.seed)


def outputs(model: nn.Module, inputs: Inputs, *, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """Run a copy of the model in eval mode, on inputs in its own dtype if no other is given."""
    return _call(_evaluating(model), inputs, dtype or dtype_of(model), seed)


def local_distance(block: nn.Module, conv: nn.Conv2d, norm: nn.Module | None) -> float:
    """Run a block, and the conv and norm that it replaces, on the same small random map, in float64 eval mode."""
    spec = ConvSpec.of(conv)
    top_left, bottom_right = spec.pads[::2], spec.pads[1::2]
    geometry = zip(spec.dilation, spec.kernel, spec.stride, top_left, bottom_right, strict=True)
    sides = [d * (k - 1) + s + 1 + max(before, after) for d, k, s, before, after in geometry]
    x = torch.randn(2, spec.c_in, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = conv if norm is None else nn.Sequential(conv, norm)
    with quietly(), one_thread():
        outs = [in_mode(module, False)(x.to(conv.weight.device)) for module in (block, before)]
    return apart(*outs)


def _against(ours: Sequence[Any], theirs: Sequence[Any], truths: Sequence[Any]) -> list[tuple[float, float]]:
    """Give how far the outputs of two models are from the truth, output by output."""
    return list(zip(pooled(ours, truths), pooled(theirs, truths), strict=True))


def _with_tensors_of(b: nn.Module, replay: nn.Module) -> nn.Module | None:
    """Copy the replay's modules and give them B's tensors; None if they do not fit, which another check reports."""
    dtype = dtype_of(b)
    in_own = None if dtype == torch.float64 else lambda t: t.to(dtype) if t.is_floating_point() else t.clone()
    twin = shadow(replay, in_own)
    try:
        twin.load_state_dict(dict(b.state_dict()), assign=True)  # without what says that B has other roles
    except RuntimeError:
        return None
    return twin


def _evaluating(model: nn.Module, cast: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    return in_mode(shadow(model, cast), False)


def _call(model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> Any:
    with quietly(seed):
        try:
            return inputs.cast_for(model, dtype).call(model)
        except Exception as error:
            raise VerifyError(
                f"a model does not run on an input of {inputs} in {dtype}: {where(error)}",
                todo=how_to_call(model, inputs),
            ) from error
