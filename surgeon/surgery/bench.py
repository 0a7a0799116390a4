"""Models → how long they take, side by side in one run.

Absolute times on a shared machine mean little and drift, so the models take turns: every round runs each of them once,
in a newly drawn order, and the ratio within a round counts. Its median over the rounds is reported with its quartiles;
if those are far apart, the report says that the ratio is not reliable. `clocks` says how time is taken on a device.

If norms follow convs, both sides are measured a second time with those norms folded, as they would be deployed:
otherwise a model whose norms were folded or taken over earlier would look faster than it is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgeon._torch_compat import has_recompile_limit
from surgeon.analysis.network import Network
from surgeon.analysis.run import how_to_call
from surgeon.errors import CaptureError
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate, in_mode, where
from surgeon.models.cost import measure
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import threads
from surgeon.proof.distance import tensors
from surgeon.surgery import clocks, turns
from surgeon.surgery.clocks import Call, Clock
from surgeon.surgery.fold import fold_blocks_, fold_norms_
from surgeon.surgery.trials import Setting, Trials
from surgeon.surgery.turns import Runner

__all__ = ["Setting", "Timing", "Trials", "compare", "deployed", "run"]

TOO_WIDE = 0.15  # the largest reliable distance of the quartiles of the pairwise ratio, as a share of its median


@dataclass(frozen=True, slots=True)
class Timing:
    """One model in one setting. Ratios compare with the first model in the same form; below 1 is less."""

    model: str
    form: str  # as it is, or with norms and blocks folded
    setting: Setting
    seconds: float  # the median of a run
    spread: float  # distance of the quartiles, as a share of the median
    macs: int | None
    macs_ratio: float | None
    time_ratio: float  # the median of the pairwise ratios
    quartiles: tuple[float, float]  # of the pairwise ratios
    peak_bytes: int | None  # memory of one run beyond what was held before; None if the system does not report it
    device: str = "cpu"  # and its name, where it has one
    dtype: str = "float32"  # of the model as it ran

    @property
    def per_second(self) -> float:
        return self.setting.batch / self.seconds

    @property
    def is_believable(self) -> bool:
        low, high = self.quartiles
        return high - low <= TOO_WIDE * self.time_ratio


def run(
    models: Sequence[tuple[str, nn.Module]],
    inputs: Inputs,
    settings: Sequence[Setting],
    *,
    rounds: int = 15,
    progress: Progress = silent,
    clock_of: Callable[[torch.device], Clock] = clocks.of,
) -> tuple[Timing, ...]:
    """Time models with labels on inputs of this kind in each of the settings; they are copied, and stay as they are.

    Raises:
        CaptureError: a model does not run, or a setting does not fit where it runs.
    """
    timings: list[Timing] = []
    clock_for = functools.cache(clock_of)  # the name of a device is asked for once
    for setting, (_, model) in itertools.product(settings, models):
        check((setting,), clock_for(devices.of(model) or devices.CPU).place)
    for i, setting in enumerate(settings):
        part = parts(progress, i / len(settings), (i + 1) / len(settings))
        with threads(setting.threads), _compiling(setting.compiled):
            timings += _run_setting(models, inputs.batched(setting.batch), setting, rounds, part, clock_for)
    return tuple(timings)


def check(settings: Sequence[Setting], device: torch.device) -> None:
    """Refuse settings that do not fit together, or not to a device.

    Raises:
        CaptureError: one does not.
    """
    for setting in settings:
        if why := setting.refusal(device):
            raise CaptureError(why, todo=setting.remedy)


def compare(
    models: Sequence[tuple[str, nn.Module]], inputs: Inputs, *, rounds: int = 15, progress: Progress = silent
) -> tuple[Timing, ...]:
    """Time models with labels as they are deployed, with blocks and norms folded, on this very input.

    Raises:
        CaptureError: one of them does not run.
    """
    setting = Setting(inputs.batch, torch.get_num_threads())
    ready = []
    for i, (label, model) in enumerate(models):
        progress(f"warming up {label}", 0.3 * i / len(models))
        ready.append(_prepare(label, "folded", deployed(model, inputs)[0], inputs, setting, clocks.of))
    _take_turns(ready, rounds, parts(progress, 0.3, 1), "timing")
    return tuple(_timing(one, ready[0], setting) for one in ready)


def deployed(model: nn.Module, inputs: Inputs | None = None) -> tuple[nn.Module, bool]:
    """Copy a model with its blocks and norms folded, and say whether there was anything to fold."""
    place = devices.of(model) or devices.CPU
    model = in_mode(duplicate(devices.on(model, devices.CPU)), False)  # in float64, which not every device has
    found = [*fold_blocks_(Network(model, called_with=inputs)), *fold_norms_(Network(model, called_with=inputs))]
    return devices.moved(model, place), bool(found)


@dataclass(slots=True)
class _Candidate:
    label: str
    form: str
    macs: int | None
    peak_bytes: int | None
    dtype: str
    runner: Runner


def _run_setting(
    models: Sequence[tuple[str, nn.Module]],
    inputs: Inputs,
    setting: Setting,
    rounds: int,
    progress: Progress,
    clock_of: Callable[[torch.device], Clock],
) -> list[Timing]:
    forms = [(label, "as it is", model) for label, model in models]
    if not setting.train:
        folded = [(label, *deployed(model, inputs)) for label, model in models]
        if any(is_other for *_, is_other in folded):
            forms += [(label, "folded", model) for label, model, _ in folded]
    ready = []
    for i, (label, form, model) in enumerate(forms):
        progress(f"{setting}: warming up {label}", 0.3 * i / len(forms))
        ready.append(_prepare(label, form, model, inputs, setting, clock_of))
    _take_turns(ready, rounds, parts(progress, 0.3, 1), str(setting))
    firsts = {one.form: one for one in reversed(ready)}
    return [_timing(one, firsts[one.form], setting) for one in ready]


def _take_turns(ready: Sequence[_Candidate], rounds: int, progress: Progress, title: str) -> None:
    def say(done: int) -> None:
        progress(f"{title}: round {done + 1} of {rounds}", done / rounds)

    turns.take_([one.runner for one in ready], rounds, say=say)


def _prepare(
    label: str,
    form: str,
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    clock_of: Callable[[torch.device], Clock],
) -> _Candidate:
    """Copy a model into a setting, and run it until it has settled."""
    own = in_mode(duplicate(model), setting.train)
    if setting.dtype is not None:
        own = own.to(getattr(torch, setting.dtype))
    given = inputs.cast_for(own)
    if setting.channels_last:
        own = own.to(memory_format=torch.channels_last)
        given = given.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    clock = clock_of(devices.of(own) or devices.CPU)
    call = _call(own, given, setting)
    try:
        macs = measure(model, given).macs
        call()
        peak = clock.peak_bytes(call)
        call = clock.captured(call) if setting.graphs else call
        runner = Runner.settled(call, clock)
    except Exception as error:
        raise CaptureError(
            f"{label} does not run ({setting}): {where(error)}", todo=how_to_call(model, given)
        ) from error
    return _Candidate(label, form, macs, peak, str(devices.dtype_of(own)).removeprefix("torch."), runner)


def _call(model: nn.Module, given: Inputs, setting: Setting) -> Call:
    """Make the call that is timed."""
    called: Callable[..., Any] = model
    if setting.compiled:
        called = torch.compile(model, dynamic=False, mode=None if setting.mode == "default" else setting.mode)
    call = _step(model, called, given) if setting.train else _pass(called, given)
    if setting.autocast is None:
        return call
    kind, dtype = (devices.of(model) or devices.CPU).type, getattr(torch, setting.autocast)

    def cast() -> object:
        with torch.autocast(kind, dtype, cache_enabled=not setting.graphs):  # a graph would hold the casts of one run
            return call()

    return cast


def _pass(called: Callable[..., Any], inputs: Inputs) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return inputs.call(called)

    return call


def _step(model: nn.Module, called: Callable[..., Any], inputs: Inputs) -> Call:
    """Forward, backward, and forget the gradients."""

    def call() -> object:
        outs = [out for out in tensors(inputs.call(called)) if out.requires_grad]
        torch.autograd.backward([out.float().mean() for out in outs])
        model.zero_grad(set_to_none=True)
        return None

    return call


def _timing(one: _Candidate, first: _Candidate, setting: Setting) -> Timing:
    low, median, high = turns.quartiles(one.runner.seconds)
    ratio_low, ratio, ratio_high = turns.ratio(one.runner, first.runner)
    return Timing(
        model=one.label,
        form=one.form,
        setting=setting,
        seconds=median,
        spread=(high - low) / median,
        macs=one.macs,
        macs_ratio=one.macs / first.macs if one.macs and first.macs else None,
        time_ratio=ratio,
        quartiles=(ratio_low, ratio_high),
        peak_bytes=one.peak_bytes,
        device=one.runner.clock.name,
        dtype=one.dtype,
    )


@contextlib.contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    """Forget what was compiled before, and let many models of one class be compiled side by side."""
    if not wanted:
        yield
        return
    torch.compiler.reset()
    with has_recompile_limit(1000):
        yield
