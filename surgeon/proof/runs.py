"""The models in their dtypes, one run of both on one input, and what was measured: the evidence that the checks judge.

A model with few outputs is run on more inputs of that kind, because the error of one number says nothing: two correct
roundings of one number differ by more than a factor of two in three of ten cases.

The `margin` m is 2, and 3 for half types. No flat tolerance is right, since a deep network in bfloat16 is 20 % away
from its own float64 result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.copies import kind_of, where
from surgeon.models.devices import dtype_of
from surgeon.octave.absorb import undone
from surgeon.proof import in_common, pairing
from surgeon.proof.calls import call, evaluating
from surgeon.proof.distance import (
    EXACT,
    Apart,
    as_double,
    dtype_name,
    excess,
    furthest,
    is_matched,
    largest,
    matched,
    pooled,
    rounded_to,
    tensors,
    worst,
)
from surgeon.proof.evidence import Exactness, Measured, Replay
from surgeon.proof.figures import figures
from surgeon.proof.isolated import Gap, Judge, measure
from surgeon.proof.probes import positive, probes
from surgeon.proof.recorder import Recorder
from surgeon.proof.report import Distance
from surgeon.proof.ulps import Jitter, Off, same
from surgeon.proof.wiring import own_tensors, wiring

ENOUGH = 64  # numbers are needed to measure a rounding error; two correct ones then differ by m once in 50,000 cases
_SHAKES = 4  # times that weights are moved, because it is chance whether two near numbers change places
_HOPELESS = 30.0  # times a limit that two draws have set: no further one makes up for it
_ARITHMETIC = 64  # units: relative L2 by which two runs may differ through their order of arithmetic alone
_NUDGE = 1e-3  # of every number of an input; an output that this moves by less than a millionth part is flat


class NotInFloat64Error(Exception):
    """A model runs in its own dtype, and not in float64; the message says which, and why not."""


class Models:
    """The models in their dtypes and in `exact`, which is float64 if A runs there; and the modules that they share."""

    def __init__(self, a: nn.Module, b: nn.Module, replay: Replay | None, seed: int, exact: torch.dtype) -> None:
        cast = None if replay is None else replay.dtype
        self.dtype, self.exact, self.seed = cast or dtype_of(a), exact, seed
        self.was_cast = self.dtype != dtype_of(a)
        self.own_a, self.own_b = evaluating(a, rounded_to(self.dtype) if self.was_cast else None), evaluating(b)
        self.double_a = evaluating(a, as_double)
        self.is_double = exact == torch.float64
        self.a = self.double_a if self.is_double else self.own_a
        self.b = evaluating(undone(b), as_double if self.is_double else None)  # steps that can be compared one by one
        self.replay = evaluating(replay.exact) if replay is not None else None
        self.noise: list[Apart] = []  # what moving weights does to the outputs
        self.is_compiled = isinstance(b, Compiled) or isinstance(a, Compiled)
        self.still: dict[int, Tensor] | None = None  # numbers that both hold alike, by address
        self.twin = in_common.with_tensors_of(self.b, self.replay) if self.replay is not None else None
        self.margin = 2.0 if self.dtype in (torch.float32, torch.float64) else 3.0
        self.core_a, self.core_b = self.own_a, self.own_b
        if replay is None:
            self.core_a, self.core_b = (
                pairing.unwrapped(one, two) for one, two in ((self.own_a, self.own_b), (self.own_b, self.own_a))
            )
        self.pairing = (pairing.pair if replay is None else pairing.sites)(self.core_a, self.core_b)
        others = dict(self.core_b.named_modules(remove_duplicate=False))
        self.kinds = {
            path: (kind_of(module).__name__, kind_of(others[self.pairing.there[path]]).__name__)
            for path, module in self.core_a.named_modules()
            if self.pairing.there.get(path) in others
        }
        self.sites = {path for path in self.kinds if pairing.is_site(self.core_a.get_submodule(path))}

    @property
    def arithmetic(self) -> float:
        few = _ARITHMETIC * torch.finfo(self.exact).eps
        return max(few, EXACT) if self.is_compiled and self.is_double else few  # a file has other steps

    def run(self, inputs: Sequence[Inputs]) -> tuple[Measured, ...]:
        """Run both models on every input, and on one more.

        Raises:
            NotInFloat64Error: A should be compared in float64, but runs only in its own dtype.
            VerifyError: the outputs differ in structure, shape or dtype, or a model does not run.
        """
        runs = [self._run(one) for one in inputs]
        return (*runs, *self._probed(inputs[0]), *self._of_pictures(inputs[0]))

    def _run(self, inputs: Inputs) -> Measured:
        recorder = self._recorder()
        with recorder.recording():
            truth = self._truth(inputs)
        out_b = self._compared(recorder, inputs, truth)
        more = self._more(inputs, truth)
        draws = [inputs, *more]
        truths = [truth, *(self._call(self.a, one, self.exact) for one in more)]
        outs_b = [out_b, *(self._call(self.b, one, self.exact) for one in more)]
        owns = [[self._call(model, one, self.dtype) for one in draws] for model in (self.own_a, self.own_b)]
        is_steady = all(map(is_matched, [*outs_b, *owns[0], *owns[1]], [*truths, *truths, *truths]))
        if not is_steady and self._needs_outputs:
            raise VerifyError(
                f"the shapes of the outputs depend on rounding: in {dtype_name(self.dtype)} "
                "they differ from those in float64",
                todo="Compare the part of the network that comes before its thresholds.",
            )
        flat = self._flat(inputs, truth)
        is_rounded = is_steady and self.dtype != self.exact
        return Measured(
            label=str(inputs),
            distance=self._distance(inputs, (out_b, truth), (owns[1][0], owns[0][0])) if is_steady else None,
            exact=None if self.replay is None else self._exactness(self.replay, inputs, truth, recorder, bool(flat)),
            modules=None if self.twin is None else worst(out_b, self._call(self.twin, inputs, self.exact)),
            storage=self._storage(outs_b, truths, draws) if self._needs_outputs else [],
            rounding=self._rounding(owns, outs_b, self._own_truths(truths, draws), draws) if is_rounded else [],
            draws=len(draws),
            gaps=self._gaps(recorder),
            merged=recorder.merged,
            wiring=None if self.replay is not None else self._wiring(recorder, inputs, truth),
            flat=flat,
            outputs=len(_floats(truth)),
            odd=sum(not t.isfinite().all() for t in tensors(owns[1][0]) if t.is_floating_point()),
            blank=sum(not t.isfinite().any() for t in _floats(truth)),
        )

    def _own_truths(self, truths: list[Any], draws: Sequence[Inputs]) -> list[Any]:
        """Run A in float64 as it is in its own dtype, which is another A where it was cast."""
        as_stored = evaluating(self.own_a, as_double) if self.was_cast else None
        return truths if as_stored is None else [self._call(as_stored, one, self.exact) for one in draws]

    def _recorder(self) -> Recorder:
        if self.replay is not None:
            return Recorder(self.a, self.b, self.pairing)
        return Recorder(pairing.unwrapped(self.a, self.b), pairing.unwrapped(self.b, self.a), self.pairing)

    def _compared(self, recorder: Recorder, inputs: Inputs, truth: Any) -> Any:
        """Run B on what A has run on.

        Raises:
            VerifyError: it does not run, or gives something that cannot be compared; `facts` has the `site`.
        """
        try:
            with recorder.comparing():
                out = self._call(self.b, inputs, self.exact)
            if self.replay is None:
                matched(out, truth)
        except VerifyError as error:
            if self.is_double and isinstance(self.b, Compiled) and is_matched(self._own(inputs), truth):
                raise NotInFloat64Error(f"B does not run in float64 ({where(error.__cause__ or error)})") from error
            problem = error.problem.replace("a model does not run", "A runs, and B does not,")
            if (site := recorder.first_other) is not None:
                problem += f"; in B the result of {site} is the first that has another shape than in A"
            elif (site := recorder.stopped_in) is not None:
                problem += f"; it stops in {site}"
            todo = error.todo if problem == error.problem else "Make B from A again, or compare it with another model."
            raise VerifyError(problem, todo=todo, site=site) from error
        return out

    def _probed(self, inputs: Inputs) -> list[Measured]:
        """Run both on an input of another size, with larger numbers in it, if A takes one: only in float64."""
        for probe in probes(inputs, self.seed) if self.is_double else []:
            if in_common.refusal(self.own_a, self.own_b, probe) is not None:
                continue  # a file says itself which sizes it takes
            recorder = self._recorder()
            try:
                with recorder.recording():
                    truth = self._call(self.a, probe, self.exact)
                if not _floats(truth) or any(not t.isfinite().all() for t in _floats(truth)):
                    continue
            except VerifyError:
                continue
            return [self._probe(probe, truth, recorder)]
        return []

    def _of_pictures(self, inputs: Inputs) -> list[Measured]:
        """Compare outputs for numbers that are not negative, and larger; what is replayed is compared in structure."""
        for one in positive(inputs, self.seed) if self.is_double and self.replay is None else []:
            try:
                truth = self._call(self.a, one, self.exact)
            except VerifyError:
                continue
            if not _floats(truth) or any(not t.isfinite().all() for t in _floats(truth)):
                continue
            label = f"{one} (drawn, not negative)"
            try:
                out = self._call(self.b, one, self.exact)
                matched(out, truth)
            except VerifyError as error:
                return [Measured(label, is_probe=True, failed=error.problem)]
            found = self._storage([out], [truth], [one])
            return [Measured(label, is_probe=True, storage=found, outputs=len(_floats(truth)))]
        return []

    def _probe(self, probe: Inputs, truth: Any, recorder: Recorder) -> Measured:
        label = f"{probe} (drawn)"
        try:
            out_b = self._compared(recorder, probe, truth)
        except VerifyError as error:
            return Measured(label, is_probe=True, failed=error.problem)
        return Measured(
            label,
            is_probe=True,
            exact=None if self.replay is None else self._exactness(self.replay, probe, truth, recorder, False),
            modules=None if self.twin is None else worst(out_b, self._call(self.twin, probe, self.exact)),
            storage=self._storage([out_b], [truth], [probe]) if self._needs_outputs else [],
            gaps=self._gaps(recorder),
            wiring=None if self.replay is not None else self._wiring(recorder, probe, truth),
            outputs=len(_floats(truth)),
        )

    @property
    def _needs_outputs(self) -> bool:
        """Whether the distance of the outputs is all that there is to judge them by."""
        return self.replay is None or not self.is_double

    def _truth(self, inputs: Inputs) -> Any:
        try:
            return self._call(self.a, inputs, self.exact)
        except VerifyError as error:
            if self.exact == self.dtype:
                raise
            self._call(self.own_a, inputs, self.dtype)  # if that does not run either, the input is wrong
            raise NotInFloat64Error(f"A does not run in float64 ({where(error.__cause__ or error)})") from error

    def _exactness(self, replay: nn.Module, inputs: Inputs, truth: Any, recorder: Recorder, is_flat: bool) -> Exactness:
        """Compare the outputs of the replay with A's; if A is flat or ill-conditioned there, its blocks, too."""
        if not self.is_double:
            return Exactness(None, blocks=recorder.blocks_apart(self.double_a, replay))
        out = self._call(replay, inputs, torch.float64)
        if is_matched(out, truth):
            found = pooled([out], [truth])
            if all(one.l2 <= EXACT and not one.flips for one in found):
                blocks = recorder.blocks_apart(self.a, replay) if is_flat else None
                return Exactness(max(one.l2 for one in found), blocks=blocks)
        blocks = recorder.blocks_apart(self.a, replay)
        shaken = [evaluating(self.a, Jitter(self.seed + i)) for i in range(_SHAKES)]
        moved = [self._call(model, inputs, torch.float64) for model in shaken]
        if not all(is_matched(one, truth) for one in (out, *moved)):
            return Exactness(None, blocks=blocks)
        noise = largest([pooled([one], [truth]) for one in moved])
        limits = [
            (one.l2 if one.flips <= most.flips_allowed(self.margin) else torch.inf, max(EXACT, self.margin * most.l2))
            for one, most in zip(pooled([out], [truth]), noise, strict=True)
        ]
        _, worst_found, limit = next(furthest(limits))
        return Exactness(worst_found, limit, blocks)

    def _distance(self, inputs: Inputs, exact: tuple[Any, Any], own: tuple[Any, Any]) -> Distance:
        return figures(str(inputs), exact if self.is_double else None, own)

    def _storage(
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
            keeps, still = not self.is_double, self._still(draws[0])
            moved = evaluating(model, Jitter(self.seed + i, units=units, keeps_dtype=keeps, still=still))
            noise = largest([noise, pooled([self._call(moved, one, self.exact) for one in draws], outs)])
            if not i:
                continue
            limits = [self.margin * most.l2 + self.arithmetic for most in noise]
            worst_of = max(excess(one.l2, limit) for one, limit in zip(found, limits, strict=True))
            if worst_of > _HOPELESS or self._is_explained(found, noise):
                break
        self.noise = noise
        return list(zip(found, noise, strict=True))

    def _still(self, inputs: Inputs) -> dict[int, Tensor]:
        """Say which numbers need not be moved: a file holds A's, and A is as exact as they are."""
        if self.still is None:
            is_exact = self.is_compiled and self.is_double and not in_common.narrows(self.a, self.b, inputs, self.seed)
            self.still = in_common.still(self.own_a, self.own_b) if is_exact else {}
        return self.still

    def _own(self, inputs: Inputs) -> Any:
        """Run B in its own dtype; None where it does not run."""
        try:
            return self._call(self.own_b, inputs, self.dtype)
        except VerifyError:
            return None

    def _is_explained(self, found: Sequence[Apart], noise: Sequence[Apart]) -> bool:
        pairs = list(zip(found, noise, strict=True))
        is_near = all(excess(one.l2, self.margin * most.l2 + self.arithmetic) <= 1 for one, most in pairs)
        return is_near and all(one.flips <= most.flips for one, most in pairs)

    def _rounding(
        self, owns: Sequence[Sequence[Any]], outs_b: Sequence[Any], truths: Sequence[Any], draws: Sequence[Inputs]
    ) -> list[tuple[Apart, Apart]]:
        """Compare each model with itself in float64; B may be as far as one unit in its weights moves it.

        Folding leaves fewer steps, and larger numbers in them: a huge bias, say, or scales that are far apart.
        """
        found, noise = pooled(owns[1], outs_b), pooled(owns[0], truths)
        least = 4 * torch.finfo(self.dtype).eps
        for i in range(_SHAKES):
            pairs = list(zip(found, noise, strict=True))
            is_near = all(one.l2 <= self.margin * max(most.l2, least) for one, most in pairs)
            if is_near and all(one.flips <= most.flips_allowed(self.margin) for one, most in pairs):
                break
            moved = evaluating(self.own_b, Jitter(self.seed + i, units=1.0))
            outs = pooled([self._call(moved, one, self.exact) for one in draws], outs_b)
            noise = [one.furthest(other) for one, other in zip(noise, outs, strict=True)]
        return list(zip(found, noise, strict=True))

    def _gaps(self, recorder: Recorder) -> dict[str, Gap]:
        """Measure every stretch, in order of execution; judge it where no replay proves B."""
        if self.replay is not None:
            return {path: measure(recorder, one) for path, one in recorder.stretches.items()}
        judge = Judge(
            *(self.core_a, self.core_b, self.margin, self.arithmetic, self.seed), keeps_dtype=not self.is_double
        )
        return judge.gaps(recorder)

    def without_counterpart(self, runs: Sequence[Measured]) -> list[str]:
        """Name B's modules with weights that no module of A was compared with."""
        called = {path for run in runs for path in (*run.gaps, *run.merged)}
        roots = {self.pairing.there.get(path, path) for path in called}
        known = set(self.pairing.there.values())
        modules = self.core_b.named_modules()
        held = [path for path, module in modules if path and any(True for _ in module.parameters(recurse=False))]
        return [path for path in held if path not in known and not pairing.is_below(path, roots)]

    def same_tensors(self, runs: Sequence[Measured]) -> dict[str, Off]:
        """Compare the tensors of modules that have the same class in both, and that nobody has folded."""
        skipped = {path for run in runs for path in run.merged}
        called = {path for run in runs for path in run.gaps}
        others = dict(self.core_b.named_modules(remove_duplicate=False))
        found = {}
        for path, module in self.core_a.named_modules():
            other = others.get(self.pairing.there.get(path, path))
            is_inner = pairing.is_below(path, self.pairing.wholes)
            if other is None or kind_of(other) is not kind_of(module) or path in skipped or is_inner:
                continue
            ours, theirs = own_tensors(other), own_tensors(module)
            for name in ours.keys() & theirs.keys():
                one = same(ours[name], theirs[name], is_judged=pairing.is_below(path, called))
                found[f"{path}.{name}".lstrip(".")] = one
        return found

    def _wiring(self, recorder: Recorder, inputs: Inputs, truth: Any) -> dict[str, float] | None:
        return wiring(recorder, lambda: self._call(self.b, inputs, self.exact), truth)

    def _flat(self, inputs: Inputs, truth: Any) -> tuple[int, ...]:
        """Name the outputs of A that stay where they are when the input moves a little: saturated, dead or constant."""
        if not self.is_double or not any(t.is_floating_point() and t.numel() for t in inputs.tensors):
            return ()
        generator = torch.Generator().manual_seed(self.seed + 3)

        def nudged(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            by = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            return tensor.double() * (1 + _NUDGE * by)

        moved = self._call(self.a, inputs.map(nudged), self.exact)
        if not is_matched(moved, truth):
            return ()
        pairs = enumerate(pooled([moved], [truth]))
        return tuple(i for i, one in pairs if not one.is_whole and one.l2 <= _NUDGE * 1e-6 and not one.flips)

    def _more(self, inputs: Inputs, truth: Any) -> list[Inputs]:
        """Draw further inputs of the kind, until every output has enough numbers to measure its rounding."""
        fewest = min((t.numel() for t in tensors(truth) if t.numel()), default=ENOUGH)
        is_judged = self.dtype != torch.float64 or self._needs_outputs
        return inputs.alike(-(-ENOUGH // fewest) - 1, self.seed) if is_judged else []

    def _call(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Any:
        return call(model, inputs, dtype, self.seed)


def _floats(out: Any) -> list[Tensor]:
    return [t for t in tensors(out) if t.is_floating_point() and t.numel()]
