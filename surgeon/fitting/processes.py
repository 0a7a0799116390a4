"""One process or several: sums over the data are added up over the processes that torchrun started.

Every process takes its share of the batches and adds its sums to those of the others, over gloo on CPUs and NCCL on
GPUs. All processes then solve the same equations, and the first one writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, slots=True)
class Processes:
    """Which process this is, and of how many."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_(self, sums: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.count > 1:
            for one in sums:
                dist.all_reduce(one)


@contextlib.contextmanager
def joined(device: torch.device | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, or those that the user has joined already."""
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or not dist.is_available():
        yield Processes()
        return
    is_gpu = device is not None and device.type == "cuda"
    dist.init_process_group("nccl" if is_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
