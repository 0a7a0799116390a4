"""The models that are compared: each in its own dtype and in float64, the replay, and which modules belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.copies import kind_of
from surgeon.models.devices import dtype_of
from surgeon.octave.absorb import undone
from surgeon.proof import alike, in_common, matching, pairing
from surgeon.proof.calls import call, evaluating
from surgeon.proof.distance import EXACT, Apart, rounded_to
from surgeon.proof.evidence import Measured, Replay
from surgeon.proof.recorder import Recorder, Stretch, modules_of
from surgeon.proof.shared import Doubles
from surgeon.proof.ulps import Off, same
from surgeon.proof.wiring import own_tensors

_ARITHMETIC = 64  # units: relative L2 by which two runs may differ through their order of arithmetic alone


class Held:
    """The models in their dtypes and in `exact`, which is float64 if A runs there; and the modules that they share."""

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        replay: Replay | None,
        seed: int,
        exact: torch.dtype,
        named: matching.Pairs = (),
    ) -> None:
        cast = None if replay is None else replay.dtype
        self.dtype, self.exact, self.seed = cast or dtype_of(a), exact, seed
        self.was_cast = self.dtype != dtype_of(a)
        self.own_a, self.own_b = evaluating(a, rounded_to(self.dtype) if self.was_cast else None), evaluating(b)
        self.is_double = exact == torch.float64
        self.replay = evaluating(replay.exact) if replay is not None else None
        doubles = Doubles()
        if self.replay is not None:
            doubles.add(self.replay)
        self.double_a = evaluating(a, doubles.cast_of(a))
        self.a, self.b = self.own_a, self.own_b
        if self.is_double:
            self.a, self.b = self.double_a, evaluating(b, doubles.cast_of(b))
        self.unlike = None if self.replay is None else alike.unlike(self.double_a, self.replay, with_tensors=True)
        self._alike: dict[Any, bool] = {}  # stretch → whether B's is certainly A's
        self.is_probed = False  # whether both have run on an input that surgeon has drawn
        self.noise: list[Apart] = []  # what moving weights does to the outputs
        self.is_compiled = isinstance(b, Compiled) or isinstance(a, Compiled)
        self.still: dict[int, Tensor] | None = None  # numbers that both hold alike, by address
        self.is_built_alike = self.replay is not None and alike.is_filled_in(self.b, self.replay)
        self.a, self.b = undone(self.a), undone(self.b)  # from here on: steps that can be compared one by one
        self.twin: nn.Module | None = None  # the replay's modules with B's tensors, where they may be others than B's
        if self.replay is not None and not self.is_built_alike:
            self.twin = in_common.with_tensors_of(self.b, self.replay)
        self.margin = 2.0 if self.dtype in (torch.float32, torch.float64) else 3.0
        self.core_a, self.core_b = self.own_a, self.own_b
        if replay is None:
            self.core_a, self.core_b = (
                pairing.unwrapped(one, two) for one, two in ((self.own_a, self.own_b), (self.own_b, self.own_a))
            )
        self.matched = matching.Matched()
        if replay is None:
            self.pairing, self.matched = matching.matched(self.core_a, self.core_b, named)
        else:
            self.pairing = pairing.sites(self.core_a, self.core_b)
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

    @property
    def needs_outputs(self) -> bool:
        """Whether the distance of the outputs is all that there is to judge them by."""
        return self.replay is None or not self.is_double

    def is_alike(self, recorder: Recorder, stretch: Stretch) -> bool:
        """Whether it is certain that a stretch of B computes what A's does; it is asked again for every input."""
        key = (tuple(stretch.in_a), tuple(stretch.in_b))
        if key not in self._alike:
            sides = modules_of(recorder.a, stretch.in_a), modules_of(recorder.b, stretch.in_b)
            self._alike[key] = alike.is_alike(*sides)
        return self._alike[key]

    def recorder(self) -> Recorder:
        if self.replay is not None:
            return Recorder(self.a, self.b, self.pairing)
        return Recorder(pairing.unwrapped(self.a, self.b), pairing.unwrapped(self.b, self.a), self.pairing)

    def still_for(self, inputs: Inputs) -> dict[int, Tensor]:
        """Say which numbers need not be moved: a file holds A's, and A is as exact as they are."""
        if self.still is None:
            is_exact = self.is_compiled and self.is_double and not in_common.narrows(self.a, self.b, inputs, self.seed)
            self.still = in_common.still(self.own_a, self.own_b) if is_exact else {}
        return self.still

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

    def call(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Any:
        return call(model, inputs, dtype, self.seed)
