"""Two models → report: do they compute the same, how far are they apart, and where do they part.

Two questions, in eval mode, on copies:

1. Is the mathematics right? Where it is known how B was made from A, the same is done to A in float64 (the replay,
   handed in by the caller), and must agree with A to relative L2 ≤ 1e-10; then every tensor stored in B must be the
   replay's, rounded once (≤ 1 unit in the last place), and B must compute what the replay computes with B's tensors
   (≤ 1e-10: so its modules are the replay's, too). For any other pair both run in float64 as stored, and their
   difference must be explained by storage: at most m times what moving each of A's numbers by half a unit in the last
   place (a whole one in float64) does to A's output, output by output.
   Some networks make more than 1e-10 of a unit in the last place of their weights, or sort by numbers that are nearly
   equal. There the outputs of the replay may be m times as far from A's as that takes them, and the replay must agree
   with A to 1e-10 block by block, each on what A's block was given. So it is proved, too, where A runs in its own
   dtype only; outputs are then compared in that.
2. How far did rounding move it? In their own dtype, output by output: err(B against A in float64) ≤ m · err(A against
   A in float64).
   A model of few outputs is run on more inputs of that kind, for the error of one number says nothing: two honest
   roundings of one number differ by more than a factor of two in three of ten cases.

m is 2, and 3 for half types: no flat tolerance is right, since a deep network in bfloat16 is 20 % away from its own
float64 result. Relative L2 is ‖b − a‖ / ‖a‖ over all elements of an output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from surgeon.analysis.run import how_to_call
from surgeon.conv.spec import ConvSpec
from surgeon.display.report import report_view
from surgeon.display.shown import Shown
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.devices import dtype_of as dtype_of
from surgeon.models.sandbox import one_thread, quietly
from surgeon.proof.distance import Jitter, apart, as_double, pairs, pooled, relative_l2, stored_ulps, tensors, worst
from surgeon.proof.recorder import Gap, Tape, is_site

EXACT = 1e-10  # relative L2 in float64; correct folds measure ≤ 3e-14, known wrong ones ≥ 5e-6
ENOUGH = 64  # numbers, for a rounding error to be measured; then two honest ones differ by m once in 50,000 cases
_SHAKES = 4  # times that weights are moved: whether two near numbers change places is luck
_ONE_UNIT = "one unit in the last place of every weight"
ARITHMETIC = 64 * torch.finfo(torch.float64).eps  # relative L2 that two float64 runs may differ by their order alone
Verdict = Literal["equivalent", "different", "approximate"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was asked: what was measured, the most that it may be, and whether it is not more."""

    name: str
    measured: float
    limit: float
    passed: bool
    says: str


@dataclass(frozen=True, slots=True)
class SiteDistance:
    """How far B is from A at one conv or block, relative L2 in float64 as stored.

    `isolated`: both get A's input; `propagated`: each gets its own. `ulps`: the worst stored tensor against the replay.
    """

    path: str
    kind_a: str
    kind_b: str
    isolated: float
    propagated: float
    ulps: float | None
    parts: bool


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the outputs of B are from those of A in their own dtype, for one input; the worst output counts."""

    input: str
    float64: float | None  # relative L2 with both run in float64 as stored; None where they do not
    own: float  # relative L2 in the models' own dtype
    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    top1: float | None  # share of rows whose largest entry is the same one


@dataclass(frozen=True, slots=True)
class Replay:
    """B made anew from A: in float64 throughout, and with every tensor rounded between two operations, as in files."""

    exact: nn.Module
    rounded: nn.Module


@dataclass(frozen=True, slots=True)
class Report(Shown):
    """The answer; true where A and B are equivalent."""

    verdict: Verdict
    dtype: str
    checks: tuple[Check, ...]
    distances: tuple[Distance, ...]
    sites: tuple[SiteDistance, ...]
    remarks: tuple[str, ...] = ()

    @property
    def equivalent(self) -> bool:
        return self.verdict == "equivalent"

    @property
    def first_to_part(self) -> str | None:
        """The first site, in order of execution, that is not what it should be."""
        return next((site.path for site in self.sites if site.parts), None)

    def __bool__(self) -> bool:
        return self.equivalent

    def to_dict(self) -> dict[str, Any]:
        return {"equivalent": self.equivalent, "first_to_part": self.first_to_part} | asdict(self)

    def __rich__(self) -> RenderableType:
        return report_view(self, verdict_first=True)


def verify(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Inputs],
    *,
    replay: Replay | None = None,
    approximate: bool = False,
    seed: int = 0,
) -> Report:
    """Compare B with A on each of the inputs; neither is changed, whatever mode it is in.

    `approximate` says that B was not meant to compute what A does; then only its stored tensors are judged.

    Raises:
        VerifyError: outputs of other structure, shape or dtype, or a model that does not run.
    """
    bench = _Bench(a, b, replay, seed, torch.float64)
    if (other := dtype_of(b)) != bench.dtype:
        raise VerifyError(
            f"A is stored in {_word(bench.dtype)} and B in {_word(other)}",
            todo="Save both in one dtype to compare them.",
        )
    remarks = []
    try:
        runs = [bench.run(item) for item in inputs]
    except _NotInFloat64Error as error:
        bench = _Bench(a, b, replay, seed, bench.dtype)
        runs = [bench.run(item) for item in inputs]
        remarks.append(f"A does not run in float64 ({error}), so outputs were compared in {_word(bench.dtype)}")
    ulps = stored_ulps(b, replay.rounded) if replay is not None else {}
    checks = [] if approximate else [*_mathematics(runs, bench), *_storage(runs, bench), *_rounding(runs, bench)]
    checks += [] if approximate else _numbers(runs)
    if replay is not None:
        checks += [_storage_check(ulps), *_modules(runs)]
    passed = all(check.passed for check in checks)
    sites = _site_table(bench, runs, ulps, approximate=approximate, judge=not passed)
    return Report(
        verdict="different" if not passed else "approximate" if approximate else "equivalent",
        dtype=_word(bench.dtype),
        checks=tuple(checks),
        distances=tuple(run.distance for run in runs if run.distance is not None),
        sites=sites,
        remarks=(*remarks, *_remarks(runs)),
    )


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


class _NotInFloat64Error(Exception):
    """A runs in its own dtype, and not in float64; the message says why not."""


@dataclass(frozen=True, slots=True)
class _Exact:
    """How far the replay is from A in float64: its outputs, and its blocks where outputs alone cannot tell."""

    outputs: float | None  # the one that is furthest beyond its limit; None where A does not run in float64
    limit: float = EXACT
    blocks: float | None = None


@dataclass(slots=True)
class _Run:
    """What was measured for one input."""

    label: str  # of the input
    distance: Distance | None  # None where the shapes of outputs depend on rounding
    exact: _Exact | None  # replay against A
    modules: float | None  # B against the replay with B's tensors, in float64 if A runs there
    storage: list[tuple[float, float]]  # output by output: B, and jittered A, against A; not where a replay proves B
    rounding: list[tuple[float, float]]  # output by output: B, and A, in their own dtype against A in float64
    draws: int  # how many inputs of the kind those two were measured on
    sites: dict[str, Gap]
    odd: int  # outputs of B that hold NaN or Inf
    blank: int  # outputs of A in which no number is finite


class _Bench:
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
        self.arithmetic = ARITHMETIC if is_double else 64 * torch.finfo(exact).eps
        self.margin = 2.0 if self.dtype in (torch.float32, torch.float64) else 3.0
        self.kinds = {
            path: (type(module).__name__, type(others[path]).__name__)
            for others in [dict(b.named_modules())]
            for path, module in a.named_modules()
            if path in others and is_site(module) and is_site(others[path])
        }

    def run(self, inputs: Inputs) -> _Run:
        tape = Tape(self.a, self.b, self.kinds)
        with tape.recording(self.a):
            truth = self._truth(inputs)
        with tape.comparing(self.b):
            out_b = self._call(self.b, inputs, self.exact)
        if self.replay is None:
            pairs(out_b, truth)  # what has other outputs cannot be compared
        more = self._more(inputs, truth)
        draws = [inputs, *more]
        truths = [truth, *(self._call(self.a, one, self.exact) for one in more)]
        owns = [[self._call(model, one, self.dtype) for one in draws] for model in (self.own_a, self.own_b)]
        is_steady = _match(out_b, truth) and all(map(_match, [*owns[0], *owns[1]], [*truths, *truths]))
        if not is_steady and self.jittered is not None:
            raise VerifyError(
                f"the shapes of the outputs depend on rounding: in {_word(self.dtype)} they are not those of float64",
                todo="Compare the part of the network that comes before its thresholds.",
            )
        found = [t for t in tensors(truth) if t.is_floating_point() and t.numel()]
        return _Run(
            label=str(inputs),
            distance=self._distance(inputs, (out_b, truth), (owns[1][0], owns[0][0])) if is_steady else None,
            exact=None if self.replay is None else self._exact(self.replay, inputs, truth, tape),
            modules=None if self.twin is None else worst(out_b, self._call(self.twin, inputs, self.exact)),
            storage=self._storage(out_b, more, truths, draws),
            rounding=_against(owns[1], owns[0], truths) if is_steady and self.dtype != self.exact else [],
            draws=len(draws),
            sites=tape.gaps(self.b, self.jittered),
            odd=sum(not t.isfinite().all() for t in tensors(owns[1][0]) if t.is_floating_point()),
            blank=sum(not t.isfinite().any() for t in found),
        )

    def _truth(self, inputs: Inputs) -> Any:
        try:
            return self._call(self.a, inputs, self.exact)
        except VerifyError as error:
            if self.exact == self.dtype:
                raise
            self._call(self.own_a, inputs, self.dtype)  # if that does not run either, it is the input
            raise _NotInFloat64Error(where(error.__cause__ or error)) from error

    def _exact(self, replay: nn.Module, inputs: Inputs, truth: Any, tape: Tape) -> _Exact:
        """Compare the outputs of the replay with A's; where A is ill-conditioned there, its blocks, too."""
        if self.exact != torch.float64:
            return _Exact(None, blocks=tape.blocks_apart(self.double_a, replay))
        out = self._call(replay, inputs, torch.float64)
        if _match(out, truth) and (found := worst(out, truth)) <= EXACT:
            return _Exact(found)
        shaken = [_evaluating(self.a, Jitter(self.seed + i)) for i in range(_SHAKES)]
        moved = [self._call(model, inputs, torch.float64) for model in shaken]
        if not all(_match(one, truth) for one in moved):
            return _Exact(math.inf, math.inf, tape.blocks_apart(self.a, replay))
        largest = [max(one) for one in zip(*(pooled([one], [truth]) for one in moved), strict=True)]
        limits = [min(max(EXACT, self.margin * one), 1e300) for one in largest]
        _, found, limit = next(_furthest(list(zip(pooled([out], [truth]), limits, strict=True))))
        return _Exact(found, limit, tape.blocks_apart(self.a, replay))

    def _distance(self, inputs: Inputs, exact: tuple[Any, Any], own: tuple[Any, Any]) -> Distance:
        return _distance(str(inputs), exact if self.exact == torch.float64 else None, own)

    def _storage(
        self, out_b: Any, more: Sequence[Inputs], truths: Sequence[Any], draws: Sequence[Inputs]
    ) -> list[tuple[float, float]]:
        if self.jittered is None:
            return []
        outs_b = [out_b, *(self._call(self.b, one, self.exact) for one in more)]
        return _against(outs_b, [self._call(self.jittered, one, self.exact) for one in draws], truths)

    def _more(self, inputs: Inputs, truth: Any) -> list[Inputs]:
        """Draw further inputs of the kind, until every output has enough numbers for what is judged by luck."""
        fewest = min((t.numel() for t in tensors(truth) if t.numel()), default=ENOUGH)
        is_judged = self.dtype != torch.float64 or self.jittered is not None
        return inputs.alike(-(-ENOUGH // fewest) - 1, self.seed) if is_judged else []

    def _call(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Any:
        return _call(model, inputs, dtype, self.seed)


def _against(ours: Sequence[Any], theirs: Sequence[Any], truths: Sequence[Any]) -> list[tuple[float, float]]:
    """How far the outputs of two models are from the truth, output by output."""
    return list(zip(pooled(ours, truths), pooled(theirs, truths), strict=True))


def _match(own: Any, truth: Any) -> bool:
    try:
        return bool(pairs(own, truth, any_dtype=True))
    except VerifyError:
        return False


def _with_tensors_of(b: nn.Module, replay: nn.Module) -> nn.Module | None:
    """Copy the replay's modules and give them B's tensors; None where they do not fit, which another check tells."""
    dtype = dtype_of(b)
    in_own = None if dtype == torch.float64 else lambda t: t.to(dtype) if t.is_floating_point() else t.clone()
    twin = shadow(replay, in_own)
    try:
        twin.load_state_dict(b.state_dict(), assign=True)
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


def _distance(label: str, exact: tuple[Any, Any] | None, own: tuple[Any, Any]) -> Distance:
    outs = pairs(*own)
    rows = [_row(_real(b), _real(a)) for b, a in outs]
    scores = [(b, a) for b, a in outs if a.dim() == 2 and a.shape[1] > 1 and not a.is_complex()]
    return Distance(
        input=label,
        float64=None if exact is None else worst(*exact),
        own=worst(*own),
        max_abs=max(row[0] for row in rows),
        max_rel=max(row[1] for row in rows),
        sqnr_db=min(row[2] for row in rows),
        cosine=min(row[3] for row in rows),
        top1=min((_top1(b, a) for b, a in scores), default=None),
    )


def _real(tensor: Tensor) -> Tensor:
    """Give float64; of complex numbers both parts."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _row(b: Tensor, a: Tensor) -> tuple[float, float, float, float]:
    """Give (max abs, max rel, SQNR in dB, cosine) of one output."""
    difference = (b - a).abs()
    relative = relative_l2(b, a)
    cosine = nn.functional.cosine_similarity(b.flatten(), a.flatten(), dim=0).item() if a.any() else 1.0
    largest = (difference / a.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    return difference.max().item(), largest, -20 * math.log10(relative) if relative else math.inf, cosine


def _top1(b: Tensor, a: Tensor) -> float:
    return (b.argmax(1) == a.argmax(1)).double().mean().item()


def _mathematics(runs: Sequence[_Run], bench: _Bench) -> Iterator[Check]:
    exact = [run.exact for run in runs if run.exact is not None]
    known = [(one.outputs, one.limit) for one in exact if one.outputs is not None]
    if known:
        found, limit = max(known, key=lambda pair: 1.0 if pair[1] == math.inf else pair[0] / pair[1])
        says = f"done again in float64: relative L2 {found:.1e}, at most {limit:.0e}"
        if limit > EXACT:
            says += f" ({bench.margin:g} × what {_ONE_UNIT} does to A)"
        if limit == math.inf:
            says = "done again in float64; one unit in the last place of the weights changes the shapes of A's outputs"
        yield Check("mathematics", found, limit, found <= limit, says)
    blocks = [one.blocks for one in exact if one.blocks is not None]
    if blocks:
        says = f"block by block in float64, on what A's are given: relative L2 {max(blocks):.1e}, at most {EXACT:.0e}"
        yield Check("blocks", max(blocks), EXACT, max(blocks) <= EXACT, says)


def _storage(runs: Sequence[_Run], bench: _Bench) -> Iterator[Check]:
    for run in runs:
        limits = [(found, bench.margin * jitter + bench.arithmetic) for found, jitter in run.storage]
        what = "rounding every weight once more" if bench.exact != bench.dtype else _ONE_UNIT
        for i, found, limit in _furthest(limits):
            says = (
                f"{_where(run, i)}as stored in {_word(bench.exact)}: relative L2 {found:.1e}, at most {limit:.1e} "
                f"({bench.margin:g} × what {what} does)"
            )
            yield Check("storage", found, limit, found <= limit, says)


def _modules(runs: Sequence[_Run]) -> Iterator[Check]:
    known = [run.modules for run in runs if run.modules is not None]
    if known:
        says = f"with B's tensors, that network gives what B gives: relative L2 {max(known):.1e}, at most {EXACT:.0e}"
        yield Check("modules", max(known), EXACT, max(known) <= EXACT, says)


def _rounding(runs: Sequence[_Run], bench: _Bench) -> Iterator[Check]:
    for run in runs:
        eps = torch.finfo(bench.dtype).eps
        limits = [(err_b, bench.margin * max(err_a, eps)) for err_b, err_a in run.rounding]
        for i, err_b, limit in _furthest(limits):
            err_a = run.rounding[i][1]
            unit = f"A's own {err_a:.1e}" if err_a > eps else f"one unit in the last place, A is {err_a:.1e}"
            says = (
                f"{_where(run, i)}in {_word(bench.dtype)}: B is {err_b:.1e} from float64, "
                f"at most {limit:.1e} ({bench.margin:g} × {unit})"
            )
            yield Check("rounding", err_b, limit, err_b <= limit, says)


def _furthest(outputs: Sequence[tuple[float, float]]) -> Iterator[tuple[int, float, float]]:
    """Choose the output that is furthest beyond its own limit, or nearest to it: (number, found, limit)."""
    if outputs:
        i = max(range(len(outputs)), key=lambda i: outputs[i][0] / outputs[i][1])
        yield i, *outputs[i]


def _where(run: _Run, output: int) -> str:
    several = max(len(run.storage), len(run.rounding)) > 1
    words = [run.label, *[f"{run.draws} inputs of it"] * (run.draws > 1), *[f"output {output}"] * several]
    return "".join(f"{word}, " for word in words)


def _numbers(runs: Sequence[_Run]) -> Iterator[Check]:
    """What is nowhere finite cannot be compared."""
    if blank := sum(run.blank for run in runs):
        yield Check("finite", blank, 0, False, f"{blank} outputs of A hold no finite number, so nothing is shown there")


def _remarks(runs: Sequence[_Run]) -> Iterator[str]:
    if any(run.odd for run in runs):
        yield "NaN or Inf in the outputs of B"  # where they are not A's, relative L2 is infinite
    if any(run.distance is None for run in runs):
        yield "the shapes of the outputs depend on rounding, so B's were compared with those of the replay alone"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage_check(ulps: Mapping[str, float]) -> Check:
    largest = max(ulps.values(), default=0.0)
    wrong = [key for key, value in ulps.items() if value > 1]
    says = f"{len(ulps)} stored tensors are that result rounded once: worst {largest:.3g} ulp, at most 1"
    if wrong:
        says = (
            f"{len(wrong)} of {len(ulps)} stored tensors are not that result rounded once: {largest:.3g} ulp, at most 1"
        )
    return Check("stored tensors", largest, 1, not wrong, says)


def _site_table(
    bench: _Bench, runs: Sequence[_Run], ulps: Mapping[str, float], *, approximate: bool, judge: bool
) -> tuple[SiteDistance, ...]:
    """List the sites in order of execution, the worst of all runs, then what no run has called.

    A site parts only where the models do: `judge` says that they are different.
    """
    gaps: dict[str, Gap] = {}
    for run in runs:
        for path, gap in run.sites.items():
            gaps[path] = Gap(*map(max, astuple(gaps.get(path, gap)), astuple(gap)))
    stored = _by_site(ulps, {*bench.kinds})
    rows = []
    for path in dict.fromkeys([*gaps, *stored]):
        gap = gaps.get(path, Gap(0.0, 0.0, 0.0))
        own = stored.get(path, 0.0) if bench.replay is not None else None
        limit = bench.margin * gap.jitter + bench.arithmetic
        parts = judge and (own > 1 if own is not None else not approximate and gap.isolated > limit)
        kinds = bench.kinds.get(path, ("", ""))
        rows.append(SiteDistance(path, *kinds, gap.isolated, gap.propagated, own, parts))
    return tuple(rows)


def _by_site(ulps: Mapping[str, float], sites: set[str]) -> dict[str, float]:
    """Give each stored tensor to the site that holds it, or to its module; only sites and what is off are kept."""
    found: dict[str, float] = {}
    for key, value in ulps.items():
        holders = [key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1)]
        path = next((holder for holder in holders if holder in sites), holders[0] if holders else key)
        if path in sites or value > 1:
            found[path] = max(found.get(path, 0.0), value)
    return found
