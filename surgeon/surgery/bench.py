"""Models → how long they take, side by side in one run.

Absolute times on a shared machine mean little and drift, so the models take turns: every round runs each of them once,
in a newly drawn order, and the ratio within a round counts. Its median over the rounds is reported with its quartiles;
if those are far apart, the report says that the ratio is not reliable.

If norms follow convs, both sides are measured a second time with those norms folded, as they would be deployed:
otherwise a model whose norms were folded or taken over earlier would look faster than it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from surgeon.surgery.fold import fold_blocks_, fold_norms_

TOO_WIDE = 0.15  # the largest reliable distance of the quartiles of the pairwise ratio, as a share of its median
_AT_LEAST = 0.05  # seconds that one measurement takes; shorter runs are repeated within it


@dataclass(frozen=True, slots=True)
class Setting:
    """How the models are run: in eval mode without autograd, or (`train`) forward and backward in train mode."""

    batch: int
    threads: int
    channels_last: bool = False
    compiled: bool = False
    train: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        words = [f"batch {self.batch}", f"{self.threads} thread{'s' * (self.threads > 1)}", layout]
        return ", ".join([*words, *["compiled"] * self.compiled, *["training step"] * self.train])


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

    @property
    def per_second(self) -> float:
        return self.setting.batch / self.seconds

    @property
    def is_believable(self) -> bool:
        low, high = self.quartiles
        return high - low <= TOO_WIDE * self.time_ratio


@dataclass(frozen=True, slots=True)
class Trials:
    """What to measure: every batch size with every number of threads, and further layouts and compiling on request."""

    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()  # as many as torch uses, if none are given
    rounds: int = 15
    channels_last: bool = False
    compiled: bool = False
    train: bool = False

    @property
    def settings(self) -> list[Setting]:
        """Every combination."""
        layouts, ways = [False, True][: 1 + self.channels_last], [False, True][: 1 + self.compiled]
        threads = self.threads or (torch.get_num_threads(),)
        return [Setting(*one, self.train) for one in itertools.product(self.batches, threads, layouts, ways)]


def run(
    models: Sequence[tuple[str, nn.Module]],
    inputs: Inputs,
    settings: Sequence[Setting],
    *,
    rounds: int = 15,
    progress: Progress = silent,
) -> tuple[Timing, ...]:
    """Time models with labels on inputs of this kind in each of the settings; they are copied, and stay as they are.

    Raises:
        CaptureError: a model does not run.
    """
    timings: list[Timing] = []
    for i, setting in enumerate(settings):
        part = parts(progress, i / len(settings), (i + 1) / len(settings))
        with threads(setting.threads), _compiling(setting.compiled):
            timings += _run_setting(models, inputs.batched(setting.batch), setting, rounds, part)
    return tuple(timings)


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
        ready.append(_prepare(label, "folded", deployed(model, inputs)[0], inputs, setting))
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
    call: Callable[[], object]
    repeats: int
    peak_bytes: int | None
    seconds: list[float]


def _run_setting(
    models: Sequence[tuple[str, nn.Module]], inputs: Inputs, setting: Setting, rounds: int, progress: Progress
) -> list[Timing]:
    forms = [(label, "as it is", model) for label, model in models]
    if not setting.train:
        folded = [(label, *deployed(model, inputs)) for label, model in models]
        if any(is_other for *_, is_other in folded):
            forms += [(label, "folded", model) for label, model, _ in folded]
    ready = []
    for i, (label, form, model) in enumerate(forms):
        progress(f"{setting}: warming up {label}", 0.3 * i / len(forms))
        ready.append(_prepare(label, form, model, inputs, setting))
    _take_turns(ready, rounds, parts(progress, 0.3, 1), str(setting))
    firsts = {one.form: one for one in reversed(ready)}
    return [_timing(one, firsts[one.form], setting) for one in ready]


def _take_turns(ready: Sequence[_Candidate], rounds: int, progress: Progress, title: str) -> None:
    """Run each of them once in every round, in a newly drawn order."""
    order = random.Random(0)
    for done in range(rounds):
        progress(f"{title}: round {done + 1} of {rounds}", done / rounds)
        for one in order.sample(ready, len(ready)):
            one.seconds.append(_time(one.call, one.repeats))


def _prepare(label: str, form: str, model: nn.Module, inputs: Inputs, setting: Setting) -> _Candidate:
    """Copy a model into a setting, and run it until it has settled."""
    given = inputs.cast_for(model)
    own = in_mode(duplicate(model), setting.train)
    if setting.channels_last:
        own = own.to(memory_format=torch.channels_last)
        given = given.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    called: Callable[..., Any] = own
    place = devices.of(own) or devices.CPU
    if setting.compiled:
        called = torch.compile(own, dynamic=False)
    call = _finished(_step(own, called, given) if setting.train else _pass(called, given), place)
    try:
        macs = measure(model, given).macs
        call()
        peak = _peak_bytes(call) if place.type == "cpu" else _peak_bytes_there(call, place)
        once = min(_time(call, 1) for _ in range(3))
    except Exception as error:
        raise CaptureError(
            f"{label} does not run ({setting}): {where(error)}", todo=how_to_call(model, given)
        ) from error
    return _Candidate(label, form, macs, call, max(1, math.ceil(_AT_LEAST / once)), peak, [])


def _pass(called: Callable[..., Any], inputs: Inputs) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return inputs.call(called)

    return call


def _finished(call: Callable[[], object], place: torch.device) -> Callable[[], object]:
    """Wait until a device has finished; a CPU has finished when the call returns."""
    if place.type == "cpu":
        return call
    wait = torch.mps.synchronize if place.type == "mps" else lambda: torch.cuda.synchronize(place)

    def finished() -> object:
        out = call()
        wait()
        return out

    return finished


def _step(model: nn.Module, called: Callable[..., Any], inputs: Inputs) -> Callable[[], object]:
    """Forward, backward, and forget the gradients."""

    def call() -> object:
        outs = [out for out in tensors(inputs.call(called)) if out.requires_grad]
        torch.autograd.backward([out.float().mean() for out in outs])
        model.zero_grad(set_to_none=True)
        return None

    return call


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _timing(one: _Candidate, first: _Candidate, setting: Setting) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(one.seconds, first.seconds, strict=True)]
    low, median, high = _quartiles(one.seconds)
    ratio_low, ratio, ratio_high = _quartiles(ratios)
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
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@contextlib.contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    """Forget what was compiled before, and let many models of one class be compiled side by side."""
    if not wanted:
        yield
        return
    torch.compiler.reset()
    with has_recompile_limit(1000):
        yield


def _peak_bytes(call: Callable[[], object]) -> int | None:
    """Measure how much more memory the process holds at most while it runs, by the kernel's own high-water mark.

    Memory that the allocator keeps from earlier runs is given back first. Only Linux reports and resets this mark.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _peak_bytes_there(call: Callable[[], object], place: torch.device) -> int | None:
    """Measure the same on a device, by torch's own count; memory on Apple's devices is not counted."""
    if place.type != "cuda":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place)
    call()
    return max(0, torch.cuda.max_memory_allocated(place) - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
