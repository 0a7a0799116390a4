"""Two models → report: do they compute the same, how far are they apart, and where do they part.

Two questions, in eval mode, on copies:

1. Is the mathematics right? Where it is known how B was made from A, the same is done to A in float64 (the replay,
   handed in by the caller), and must agree with A to relative L2 ≤ 1e-10; then every tensor stored in B must be the
   replay's, rounded once (≤ 1 unit in the last place), and B must compute what the replay computes with B's tensors
   (≤ 1e-10: so its modules are the replay's, too). For any other pair both run in float64 as stored, and their
   difference must be explained by storage: at most m times what moving each of A's numbers by half a unit in the last
   place does to A's output.
2. How far did rounding move it? In their own dtype: err(B against A in float64) ≤ m · err(A against A in float64).
   A model of few outputs is run on more inputs of that kind, for the error of one number says nothing: two honest
   roundings of one number differ by more than a factor of two in three of ten cases.

m is 2, and 3 for half types: no flat tolerance is right, since a deep network in bfloat16 is 20 % away from its own
float64 result. Relative L2 is ‖b − a‖ / ‖a‖ over all elements of an output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.capture import how_to_call, in_mode, quietly, shadow, where
from surgeon.distance import Jitter, apart, as_double, pairs, pooled, relative_l2, stored_ulps, tensors, worst
from surgeon.errors import VerifyError
from surgeon.examples import Inputs
from surgeon.spec import ConvSpec
from surgeon.tape import Gap, Tape, is_site

EXACT = 1e-10  # relative L2 in float64; correct folds measure ≤ 3e-14, known wrong ones ≥ 5e-6
ENOUGH = 64  # numbers, for a rounding error to be measured; then two honest ones differ by m once in 50,000 cases
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
    float64: float  # relative L2 with both run in float64 as stored
    own: float  # relative L2 in the models' own dtype
    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    top1: float | None  # share of rows whose largest entry is the same one


@dataclass(frozen=True, slots=True)
class Report:
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

    def __str__(self) -> str:
        lines = [self.verdict, *(f"{'ok' if c.passed else 'FAILED'}  {c.says}" for c in self.checks)]
        if self.first_to_part:
            lines.append(f"first to part: {self.first_to_part}")
        lines += self.remarks
        return "\n".join(lines)


def verify(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Inputs],
    *,
    replay: nn.Module | None = None,
    stored: nn.Module | None = None,
    approximate: bool = False,
    seed: int = 0,
) -> Report:
    """Compare B with A on each of the inputs; neither is changed, whatever mode it is in.

    `replay` is B made anew from A in float64; `stored` is the same with every tensor rounded to its dtype between two
    operations, as files do, where that is something else. `approximate` says that B was not meant to compute what A
    does; then only its stored tensors are judged.

    Raises:
        VerifyError: outputs of other structure, shape or dtype, or a model that does not run.
    """
    bench = _Bench(a, b, replay, seed)
    if (other := dtype_of(b)) != bench.dtype:
        raise VerifyError(
            f"A is stored in {_word(bench.dtype)} and B in {_word(other)}",
            todo="Save both in one dtype to compare them.",
        )
    runs = [bench.run(item) for item in inputs]
    exact = replay if stored is None else stored
    ulps = stored_ulps(b, exact) if exact is not None else {}
    checks = [] if approximate else [*_mathematics(runs, bench), *_rounding(runs, bench), *_numbers(runs)]
    if replay is not None:
        checks += [_storage_check(ulps), *_modules(runs)]
    sites = _site_table(bench, runs, ulps, approximate=approximate)
    passed = all(check.passed for check in checks)
    return Report(
        verdict="different" if not passed else "approximate" if approximate else "equivalent",
        dtype=_word(bench.dtype),
        checks=tuple(checks),
        distances=tuple(run.distance for run in runs),
        sites=sites,
    )


def outputs(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> Any:
    """Run a copy of the model in eval mode and in its own dtype."""
    return _call(_evaluating(model), inputs.cast(dtype_of(model)), seed)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


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


@dataclass(slots=True)
class _Run:
    """What was measured for one input."""

    distance: Distance
    exact: float | None  # replay against A, in float64
    modules: float | None  # B against the replay with B's tensors, in float64
    jitter: float | None  # jittered A against A, in float64; one of the two
    err_a: float  # own dtype against A in float64, for this input and the ones like it
    err_b: float
    draws: int  # how many inputs those are
    sites: dict[str, Gap]
    finite: bool


class _Bench:
    """The models in their dtypes and as float64 copies, and the sites that they have in common."""

    def __init__(self, a: nn.Module, b: nn.Module, replay: nn.Module | None, seed: int) -> None:
        self.own_a, self.own_b = _evaluating(a), _evaluating(b)
        self.a, self.b = _evaluating(a, as_double), _evaluating(b, as_double)
        self.jittered = _evaluating(a, Jitter(seed)) if replay is None else None
        self.replay = _evaluating(replay) if replay is not None else None
        self.twin = _with_tensors_of(self.b, self.replay) if self.replay is not None else None
        self.seed = seed
        self.dtype = dtype_of(a)
        self.margin = 2.0 if self.dtype in (torch.float32, torch.float64) else 3.0
        self.kinds = {
            path: (type(module).__name__, type(others[path]).__name__)
            for others in [dict(b.named_modules())]
            for path, module in a.named_modules()
            if path in others and is_site(module) and is_site(others[path])
        }

    def run(self, inputs: Inputs) -> _Run:
        doubles, owns = inputs.cast(torch.float64), inputs.cast(self.dtype)
        tape = Tape(self.a, self.b, self.kinds)
        with tape.recording(self.a):
            truth = _call(self.a, doubles, self.seed)
        with tape.comparing(self.b):
            out_b = _call(self.b, doubles, self.seed)
        own_a, own_b = _call(self.own_a, owns, self.seed), _call(self.own_b, owns, self.seed)
        truths, owns_a, owns_b = self._more(inputs, truth)
        return _Run(
            distance=_distance(str(inputs), (out_b, truth), (own_b, own_a)),
            exact=None if self.replay is None else worst(_call(self.replay, doubles, self.seed), truth),
            modules=None if self.twin is None else worst(out_b, _call(self.twin, doubles, self.seed)),
            jitter=None if self.jittered is None else worst(_call(self.jittered, doubles, self.seed), truth),
            err_a=pooled([own_a, *owns_a], [truth, *truths]),
            err_b=pooled([own_b, *owns_b], [truth, *truths]),
            draws=1 + len(truths),
            sites=tape.gaps(self.b, self.jittered),
            finite=all(bool(t.isfinite().all()) for t in tensors(own_b) if t.is_floating_point()),
        )

    def _more(self, inputs: Inputs, truth: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Run on further inputs of the kind, until there are enough numbers: A in float64, A and B in their dtype."""
        fewest = min((t.numel() for t in tensors(truth) if t.numel()), default=ENOUGH)
        draws = inputs.alike(-(-ENOUGH // fewest) - 1, self.seed) if self.dtype != torch.float64 else []
        return (
            [_call(self.a, one.cast(torch.float64), self.seed) for one in draws],
            [_call(self.own_a, one.cast(self.dtype), self.seed) for one in draws],
            [_call(self.own_b, one.cast(self.dtype), self.seed) for one in draws],
        )


def _with_tensors_of(b: nn.Module, replay: nn.Module) -> nn.Module | None:
    """Copy the replay and give it B's tensors; None where they do not fit, which another check tells."""
    twin = shadow(replay, torch.clone)
    try:
        twin.load_state_dict(b.state_dict())
    except RuntimeError:
        return None
    return twin


def _evaluating(model: nn.Module, cast: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    return in_mode(shadow(model, cast), False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small convs, on which threads spend longer waiting for each other than working."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _call(model: nn.Module, inputs: Sequence[Tensor], seed: int) -> Any:
    with quietly():
        torch.manual_seed(seed)
        try:
            return model(*inputs)
        except Exception as error:
            shapes = ", ".join("×".join(map(str, t.shape)) for t in inputs)
            raise VerifyError(
                f"a model does not run on an input of {shapes} in {inputs[0].dtype}: {where(error)}",
                todo=how_to_call(model, len(inputs)),
            ) from error


def _distance(label: str, exact: tuple[Any, Any], own: tuple[Any, Any]) -> Distance:
    outs = pairs(*own)
    rows = [_row(_real(b), _real(a)) for b, a in outs]
    scores = [(b, a) for b, a in outs if a.dim() == 2 and a.shape[1] > 1 and not a.is_complex()]
    return Distance(
        input=label,
        float64=worst(*exact),
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
    apart = (b - a).abs()
    relative = relative_l2(b, a)
    cosine = nn.functional.cosine_similarity(b.flatten(), a.flatten(), dim=0).item() if a.any() else 1.0
    largest = (apart / a.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    return apart.max().item(), largest, -20 * math.log10(relative) if relative else math.inf, cosine


def _top1(b: Tensor, a: Tensor) -> float:
    return (b.argmax(1) == a.argmax(1)).double().mean().item()


def _mathematics(runs: Sequence[_Run], bench: _Bench) -> Iterator[Check]:
    if bench.replay is not None:
        worst = max(run.exact for run in runs if run.exact is not None)
        says = f"done again in float64: relative L2 {worst:.1e}, at most {EXACT:.0e}"
        yield Check("mathematics", worst, EXACT, worst <= EXACT, says)
        return
    for run in runs:
        assert run.jitter is not None
        limit = bench.margin * run.jitter
        says = (
            f"{run.distance.input}, as stored in float64: relative L2 {run.distance.float64:.1e}, at most {limit:.1e} "
            f"({bench.margin:g} × what half a unit in the last place of every weight does)"
        )
        yield Check("storage", run.distance.float64, limit, run.distance.float64 <= limit, says)


def _modules(runs: Sequence[_Run]) -> Iterator[Check]:
    known = [run.modules for run in runs if run.modules is not None]
    if known:
        apart = max(known)
        says = f"with B's tensors, that network gives what B gives: relative L2 {apart:.1e}, at most {EXACT:.0e}"
        yield Check("modules", apart, EXACT, apart <= EXACT, says)


def _rounding(runs: Sequence[_Run], bench: _Bench) -> Iterator[Check]:
    if bench.dtype == torch.float64:
        return  # there is nothing finer to measure its rounding with
    for run in runs:
        eps = torch.finfo(bench.dtype).eps
        limit = bench.margin * max(run.err_a, eps)
        unit = f"A's own {run.err_a:.1e}" if run.err_a > eps else f"one unit in the last place, A is {run.err_a:.1e}"
        where = f"{run.distance.input}, " + (f"{run.draws} inputs of it, " if run.draws > 1 else "")
        says = (
            f"{where}in {_word(bench.dtype)}: B is {run.err_b:.1e} from float64, "
            f"at most {limit:.1e} ({bench.margin:g} × {unit})"
        )
        yield Check("rounding", run.err_b, limit, run.err_b <= limit, says)


def _numbers(runs: Sequence[_Run]) -> Iterator[Check]:
    """Relative L2 is infinite where NaN and Inf are not the same; where they are, say so."""
    odd = sum(not run.finite for run in runs)
    if odd:
        yield Check("finite", odd, 0, True, f"{odd} of {len(runs)} runs give NaN or Inf, the same ones in A and B")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage_check(ulps: Mapping[str, float]) -> Check:
    worst = max(ulps.values(), default=0.0)
    wrong = [key for key, value in ulps.items() if value > 1]
    says = f"{len(ulps)} stored tensors are that result rounded once: worst {worst:.3g} ulp, at most 1"
    if wrong:
        says = (
            f"{len(wrong)} of {len(ulps)} stored tensors are not that result rounded once: {worst:.3g} ulp, at most 1"
        )
    return Check("stored tensors", worst, 1, not wrong, says)


def _site_table(
    bench: _Bench, runs: Sequence[_Run], ulps: Mapping[str, float], *, approximate: bool
) -> tuple[SiteDistance, ...]:
    """List the sites in order of execution, the worst of all runs, then what no run has called."""
    gaps: dict[str, Gap] = {}
    for run in runs:
        for path, gap in run.sites.items():
            gaps[path] = Gap(*map(max, astuple(gaps.get(path, gap)), astuple(gap)))
    stored = _by_site(ulps, {*bench.kinds})
    rows = []
    for path in dict.fromkeys([*gaps, *stored]):
        gap = gaps.get(path, Gap(0.0, 0.0, 0.0))
        own = stored.get(path, 0.0) if bench.replay is not None else None
        parts = own > 1 if own is not None else not approximate and gap.isolated > bench.margin * gap.jitter
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
