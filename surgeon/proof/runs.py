"""The models in their dtypes, one run of both on one input, and what was measured: the evidence that the checks judge.

A model with few outputs is run on more inputs of that kind, because the error of one number says nothing: two correct
roundings of one number differ by more than a factor of two in three of ten cases.

The `margin` m is 2, and 3 for half types. No flat tolerance is right, since a deep network in bfloat16 is 20 % away
from its own float64 result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import VerifyError
from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.copies import where
from surgeon.proof import batch, in_common
from surgeon.proof.distance import dtype_name, is_matched, matched, pooled, tensors, worst
from surgeon.proof.evidence import Measured
from surgeon.proof.explained import Explained, InOwn
from surgeon.proof.figures import figures
from surgeon.proof.isolated import Gap, Judge, measure
from surgeon.proof.probes import positive, probes
from surgeon.proof.recorder import Recorder
from surgeon.proof.report import Distance
from surgeon.proof.wiring import wiring

ENOUGH = 64  # numbers are needed to measure a rounding error; two correct ones then differ by m once in 50,000 cases
_NUDGE = 1e-3  # of every number of an input; an output that this moves by less than a millionth part is flat
_BEYOND = 10.0  # times what rounding does to an output: that far it has moved for certain


class NotInFloat64Error(Exception):
    """A model runs in its own dtype, and not in float64; the message says which, and why not."""


class Models(Explained):
    """Runs the models, and measures."""

    def run(self, inputs: Sequence[Inputs]) -> tuple[Measured, ...]:
        """Run both models on every input, and on one more.

        Raises:
            NotInFloat64Error: A should be compared in float64, but runs only in its own dtype.
            VerifyError: the outputs differ in structure, shape or dtype, or a model does not run.
        """
        probed = self._probed(inputs[0]) if self.replay is not None else []
        self.is_probed = any(not one.failed for one in probed)
        runs = [self._run(one) for one in inputs]
        return (*runs, *(probed or self._probed(inputs[0])), *self._of_pictures(inputs[0]))

    def _run(self, inputs: Inputs) -> Measured:
        """Judge the first images of a batch, if they speak for the others; else all of them."""
        first = batch.first_of(inputs) if self.is_double and not self.is_compiled else None
        if first is not None:
            with contextlib.suppress(VerifyError, NotInFloat64Error):  # it is said of the whole batch, below
                if (found := self._measured(inputs, first)) is not None:
                    return found
        found = self._measured(inputs, inputs)
        assert found is not None
        return found

    def _measured(self, inputs: Inputs, given: Inputs) -> Measured | None:
        """Measure what `given`, the inputs or a part of them, shows; None if a part does not speak for the others."""
        recorder = self.recorder()
        with recorder.recording():
            truth = self._truth(given)
        out_b = self._compared(recorder, given, truth)
        more = self._more(inputs, given, truth)
        if more is None:
            return None
        draws = [given, *more]
        truths = [truth, *(self.call(self.a, one, self.exact) for one in more)]
        outs_b = [out_b, *(self.call(self.b, one, self.exact) for one in more)]
        run = self._in_own_dtype(inputs, draws, truths)
        if run is None:
            return None
        is_steady = all(map(is_matched, [*outs_b, *run.a, *run.b], [*truths, *truths, *truths]))
        self._check_steady(is_steady)
        flat = self._flat(given, truth, run.a[0])
        is_rounded = is_steady and self.dtype != self.exact
        rounding = self.rounding(run, outs_b, self.own_truths(truths, draws), draws) if is_rounded else []
        return Measured(
            label=str(inputs),
            distance=self._distance(inputs, (out_b, truth), run.whole) if is_steady else None,
            exact=self.exactness(given, (truth, out_b), recorder, is_flat=bool(flat), rounding=rounding),
            modules=self._modules(given, out_b),
            storage=self.storage(outs_b, truths, draws) if self.needs_outputs else [],
            rounding=rounding,
            draws=len(draws) if given is inputs else 1,
            gaps=self._gaps(recorder),
            merged=recorder.merged,
            wiring=self._wiring(recorder, given, truth),
            flat=flat,
            outputs=len(_floats(truth)),
            odd=sum(not t.isfinite().all() for t in tensors(run.whole[0]) if t.is_floating_point()),
            blank=sum(not t.isfinite().any() for t in _floats(truth)),
        )

    def _check_steady(self, is_steady: bool) -> None:
        if not is_steady and self.needs_outputs:
            raise VerifyError(
                f"the shapes of the outputs depend on rounding: in {dtype_name(self.dtype)} "
                "they differ from those in float64",
                todo="Compare the part of the network that comes before its thresholds.",
            )

    def _in_own_dtype(self, inputs: Inputs, draws: Sequence[Inputs], truths: Sequence[Any]) -> InOwn | None:
        """Run both models in their own dtype on all inputs; None if those that are judged do not speak for the others.

        Images that are judged are cut out of the results of the batch.
        """
        models = (self.own_a, self.own_b)
        if draws[0] is inputs:
            a, b = ([self.call(model, one, self.dtype) for one in draws] for model in models)
            return InOwn(a, b, (b[0], a[0]))
        whole_a, whole_b = (self.call(model, inputs, self.dtype) for model in models)
        cut: list[list[Any]] = [[], []]
        judged = 0
        for one, truth in zip(draws, truths, strict=True):
            start, judged = judged, judged + one.batch
            for made, whole in zip(cut, (whole_a, whole_b), strict=True):
                made.append(batch.rows(whole, truth, start, judged, inputs.batch))
        if any(part is None for made in cut for part in made) or not batch.speaks_for(whole_b, whole_a, judged):
            return None
        return InOwn(cut[0], cut[1], (whole_b, whole_a), is_cut=True)

    def _modules(self, inputs: Inputs, out_b: Any) -> float | None:
        """Compare B with the replay's modules that have B's tensors; B is that model where it is built like that."""
        if self.is_built_alike:
            return 0.0
        return None if self.twin is None else worst(out_b, self.call(self.twin, inputs, self.exact))

    def _compared(self, recorder: Recorder, inputs: Inputs, truth: Any) -> Any:
        """Run B on what A has run on.

        Raises:
            VerifyError: it does not run, or gives something that cannot be compared; `facts` has the `site`.
        """
        try:
            with recorder.comparing():
                out = self.call(self.b, inputs, self.exact)
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
            recorder = self.recorder()
            try:
                with recorder.recording():
                    truth = self.call(self.a, probe, self.exact)
                if not _floats(truth) or any(not t.isfinite().all() for t in _floats(truth)):
                    continue
            except VerifyError:
                continue
            return [self._probe(probe, truth, recorder)]
        return []

    def _of_pictures(self, inputs: Inputs) -> list[Measured]:
        """Compare outputs for numbers that are not negative, and larger; what is replayed is compared in structure."""
        for one in positive(inputs, self.seed) if self.is_double and self.replay is None else []:
            if in_common.refusal(self.own_a, self.own_b, one) is not None:
                continue  # a file says itself which sizes it takes
            try:
                truth = self.call(self.a, one, self.exact)
            except VerifyError:
                continue
            if not _floats(truth) or any(not t.isfinite().all() for t in _floats(truth)):
                continue
            label = f"{one} (drawn, not negative)"
            try:
                out = self.call(self.b, one, self.exact)
                matched(out, truth)
            except VerifyError as error:
                return [Measured(label, is_probe=True, failed=error.problem)]
            found = self.storage([out], [truth], [one])
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
            exact=self.exactness(probe, (truth, out_b), recorder),
            modules=self._modules(probe, out_b),
            storage=self.storage([out_b], [truth], [probe]) if self.needs_outputs else [],
            gaps=self._gaps(recorder),
            wiring=self._wiring(recorder, probe, truth),
            outputs=len(_floats(truth)),
        )

    def _truth(self, inputs: Inputs) -> Any:
        try:
            return self.call(self.a, inputs, self.exact)
        except VerifyError as error:
            if self.exact == self.dtype:
                raise
            self.call(self.own_a, inputs, self.dtype)  # if that does not run either, the input is wrong
            raise NotInFloat64Error(f"A does not run in float64 ({where(error.__cause__ or error)})") from error

    def _distance(self, inputs: Inputs, exact: tuple[Any, Any], own: tuple[Any, Any]) -> Distance:
        return figures(str(inputs), exact if self.is_double else None, own)

    def _own(self, inputs: Inputs) -> Any:
        """Run B in its own dtype; None where it does not run."""
        try:
            return self.call(self.own_b, inputs, self.dtype)
        except VerifyError:
            return None

    def _gaps(self, recorder: Recorder) -> dict[str, Gap]:
        """Measure every stretch, in order of execution; judge it where no replay proves B."""
        if self.replay is not None:
            stretches = recorder.stretches.items()
            return {path: measure(recorder, one, is_alike=self.is_alike(recorder, one)) for path, one in stretches}
        judge = Judge(
            *(self.core_a, self.core_b, self.margin, self.arithmetic, self.seed, self.is_alike),
            keeps_dtype=not self.is_double,
        )
        return judge.gaps(recorder)

    def _wiring(self, recorder: Recorder, inputs: Inputs, truth: Any) -> dict[str, float] | None:
        if self.replay is not None:
            return None
        return wiring(recorder, lambda: self.call(self.b, inputs, self.exact), truth)

    def _flat(self, inputs: Inputs, truth: Any, own: Any) -> tuple[int, ...]:
        """Name the outputs of A that stay where they are when the input moves a little: saturated, dead or constant.

        In its own dtype, where A gives `own`, it takes less time to see that all of them move.
        """
        if not self.is_double or not any(t.is_floating_point() and t.numel() for t in inputs.tensors):
            return ()
        generator = torch.Generator().manual_seed(self.seed + 3)

        def nudged(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            by = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            return tensor.double() * (1 + _NUDGE * by)

        moved_input = inputs.map(nudged)
        if self.dtype == torch.float32 and not self.was_cast and is_matched(own, truth):
            noise = pooled([own], [truth])
            moved = self.call(self.own_a, moved_input, self.dtype)
            if is_matched(moved, own):
                few = torch.finfo(self.dtype).eps
                pairs = zip(pooled([moved], [own]), noise, strict=True)
                if all(one.is_whole or one.l2 > _BEYOND * max(most.l2, few) for one, most in pairs):
                    return ()
        moved = self.call(self.a, moved_input, self.exact)
        if not is_matched(moved, truth):
            return ()
        pairs_of = enumerate(pooled([moved], [truth]))
        return tuple(i for i, one in pairs_of if not one.is_whole and one.l2 <= _NUDGE * 1e-6 and not one.flips)

    def _more(self, inputs: Inputs, given: Inputs, truth: Any) -> list[Inputs] | None:
        """Draw further inputs of the kind, until every output has enough numbers to measure its rounding.

        Beside a part of a batch they are its other images; None if too many of them would be needed.
        """
        is_judged = self.dtype != torch.float64 or self.needs_outputs
        if given is not inputs:
            return batch.further(inputs, truth, ENOUGH if is_judged else 1)
        fewest = min((t.numel() for t in tensors(truth) if t.numel()), default=ENOUGH)
        return inputs.alike(-(-ENOUGH // fewest) - 1, self.seed) if is_judged else []


def _floats(out: Any) -> list[Tensor]:
    return [t for t in tensors(out) if t.is_floating_point() and t.numel()]
