"""How long a call takes on a device, and how much memory it needs.

A CPU has finished when a call returns. A GPU works through a queue: on CUDA the device itself notes when it comes to an
event before the calls and to one behind them, so the time counts from the first launch to the end of the last kernel. A
CUDA graph holds all kernels of a call; replayed, they are launched at once.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from surgeon.models import devices

Call = Callable[[], object]
_WARM = 0.3  # seconds that a GPU runs before it counts: its clock rises, and torch chooses kernels
_BEFORE_CAPTURE = 3  # calls; torch asks for a few on a stream of their own


class Clock(Protocol):
    """A clock of one device."""

    place: torch.device
    name: str  # of the device

    def seconds(self, call: Call, repeats: int) -> float:
        """Say how long a call takes, on the average of so many in a row."""

    def warm_up(self, call: Call) -> None:
        """Run until the device has settled."""

    def peak_bytes(self, call: Call) -> int | None:
        """Say how much more memory a call needs than was held before; None where that is not known."""

    def captured(self, call: Call) -> Call:
        """Give a call that replays the kernels of this one."""


class HostClock:
    """The clock of the CPU, or of a device that has to be waited for."""

    def __init__(self, place: torch.device = devices.CPU, wait: Call | None = None) -> None:
        self.place, self.name, self._wait = place, str(place), wait

    def seconds(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
            if self._wait is not None:
                self._wait()
        return (time.perf_counter() - start) / repeats

    def warm_up(self, call: Call) -> None:
        self.seconds(call, 1)

    def peak_bytes(self, call: Call) -> int | None:
        """Measure how much more memory the process holds at most, by the kernel's own high-water mark.

        Memory that the allocator keeps from earlier runs is given back first. Only Linux reports and resets this mark.
        Memory of Apple's devices is not counted.
        """
        if self._wait is not None:
            return None
        try:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark
            before = _status("VmRSS")
            call()
            return max(0, _status("VmHWM") - before)
        except (OSError, AttributeError, StopIteration):
            return None

    def captured(self, call: Call) -> Call:
        raise NotImplementedError("only CUDA has graphs")  # `Setting.refusal` has said so


class CudaClock:
    """The clock of a CUDA device; `cuda` is torch's module of that name."""

    def __init__(self, place: torch.device, cuda: Any = torch.cuda) -> None:
        self.place, self._cuda = place, cuda
        self.name = f"{place} ({cuda.get_device_name(place)})"

    def seconds(self, call: Call, repeats: int) -> float:
        """Time calls by events of the device; it is idle when they start."""
        with self._cuda.device(self.place):
            self._cuda.synchronize(self.place)
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats

    def warm_up(self, call: Call) -> None:
        spent = self.seconds(call, 1)
        while spent < _WARM:
            spent += max(self.seconds(call, 5) * 5, _WARM / 100)  # however short a call is, this ends

    def peak_bytes(self, call: Call) -> int | None:
        """Measure by torch's own count of the device's memory."""
        gc.collect()
        self._cuda.synchronize(self.place)
        self._cuda.reset_peak_memory_stats(self.place)
        before = self._cuda.memory_allocated(self.place)
        call()
        self._cuda.synchronize(self.place)
        return max(0, int(self._cuda.max_memory_allocated(self.place)) - int(before))

    def captured(self, call: Call) -> Call:
        """Run a few times on a stream of its own, as torch asks, and capture one run."""
        with self._cuda.device(self.place):
            side = self._cuda.Stream(self.place)
            side.wait_stream(self._cuda.current_stream(self.place))
            with self._cuda.stream(side):
                for _ in range(_BEFORE_CAPTURE):
                    call()
            self._cuda.current_stream(self.place).wait_stream(side)
            self._cuda.synchronize(self.place)
            graph = self._cuda.CUDAGraph()
            with self._cuda.graph(graph):
                kept = call()  # the graph writes into these tensors

        def replay() -> object:
            graph.replay()
            return kept

        return replay


def of(place: torch.device) -> Clock:
    """Give the clock of a device."""
    if place.type == "cuda":
        return CudaClock(place)
    return HostClock(place, torch.mps.synchronize if place.type == "mps" else None)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
