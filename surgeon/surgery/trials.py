"""What is timed: the settings in which networks run, and which of them fit together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from surgeon.surgery.precision import Half

Mode = Literal["default", "reduce-overhead", "max-autotune"]  # of torch.compile
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the models are run: in eval mode without autograd, or (`train`) forward and backward in train mode.

    `dtype` is what the models are cast to, and `autocast` what torch casts to on the way; `graphs` replays a run that
    was captured in a CUDA graph, so that only kernels are timed and none of the time that it takes to launch them.
    """

    batch: int
    threads: int
    channels_last: bool = False
    compiled: bool = False
    train: bool = False
    mode: Mode = "default"
    graphs: bool = False
    dtype: Half | None = None
    autocast: Half | None = None

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        words = [f"batch {self.batch}", f"{self.threads} thread{'s' * (self.threads > 1)}", layout]
        words += [self.dtype] if self.dtype is not None else []
        words += [f"autocast {self.autocast}"] if self.autocast is not None else []
        compiled = "compiled" if self.mode == "default" else f"compiled ({self.mode})"
        words += [compiled] * self.compiled + ["CUDA graph"] * self.graphs
        return ", ".join([*words, *["training step"] * self.train])

    def refusal(self, device: torch.device) -> str | None:
        """Say what does not fit together, or not to a device."""
        if self.graphs and device.type != "cuda":
            return f"CUDA graphs are captured on CUDA devices, and the models run on {device}"
        if self.graphs and self.compiled and self.mode != "default":
            return f"compiled with {self.mode}, a network is in CUDA graphs of its own, which no other graph can hold"
        if self.train and self.dtype is not None:
            return f"a network whose weights are {self.dtype} is not trained that way"
        if self.dtype is not None and self.autocast is not None:
            return f"a network in {self.dtype} leaves nothing for autocast to cast"
        return None

    @property
    def remedy(self) -> str:
        """Say what to do where `refusal` says something."""
        if self.train and self.dtype is not None:
            short = "fp16" if self.dtype == "float16" else "bf16"
            return f"Take --autocast {short} (in Python, autocast={self.dtype!r}) for a training step."
        if self.graphs and self.compiled and self.mode != "default":
            return "Take --graphs or this mode away."
        return "Give --device cuda, or take --graphs away." if self.graphs else "Take one of the two away."


@dataclass(frozen=True, slots=True)
class Trials:
    """What to measure: every batch size with every number of threads, and further layouts and compiling on request."""

    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()  # as many as torch uses, if none are given
    rounds: int = 15
    channels_last: bool = False
    compiled: bool = False
    train: bool = False
    modes: tuple[Mode, ...] = ()  # of compiling; the default one, if none is given
    graphs: bool = False
    dtype: Half | None = None
    autocast: Half | None = None

    @property
    def settings(self) -> list[Setting]:
        """Every combination."""
        layouts, threads = [False, True][: 1 + self.channels_last], self.threads or (torch.get_num_threads(),)
        modes = self.modes or MODES[: self.compiled]
        ways: list[tuple[bool, Mode, bool]] = [(False, "default", False), *((True, mode, False) for mode in modes)]
        if self.graphs:  # the other modes are CUDA graphs by themselves
            ways += [(*way[:2], True) for way in ways if way[1] == "default"]
        return [
            Setting(batch, count, last, compiled, self.train, mode, graphs, self.dtype, self.autocast)
            for batch, count, last, (compiled, mode, graphs) in itertools.product(self.batches, threads, layouts, ways)
        ]
