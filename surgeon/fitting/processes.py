"""One process or several: sums over the data are added up over the processes that torchrun started.

    torchrun --nproc-per-node 4 -m surgeon fit …

Every process takes whole batches, those i with i % count == rank, and adds its sums to those of the others, over gloo
on CPUs and NCCL on GPUs. All processes then solve the same equations; the first one prints and writes. What a batch is
used for depends on its number among all batches, and sums are exact, so that the result does not depend on the number
of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from surgeon.conv.exact import Total
from surgeon.errors import DataError, FitError, SurgeonError
from surgeon.fitting.data import Data
from surgeon.fitting.supply import Batch

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which process this is, and of how many."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def batches(self, data: Data, most: int | None = None) -> Iterator[tuple[int, Batch]]:
        """Give the batches of this process, each with its number among all; with `most`, of the first ones only.

        >>> from surgeon.fitting import data
        >>> whole = data.of(torch.rand(10, 3, 8, 8), batch=2)
        >>> [i for i, _ in Processes(rank=1, count=2).batches(whole)]
        [1, 3]
        """
        for i, batch in enumerate(data.share(self.rank, self.count)):
            number = self.rank + i * self.count
            if most is not None and number >= most:
                return
            yield number, batch

    def add_(self, sums: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.count > 1:
            with _others():
                for one in sums:
                    _in_place_(one, dist.all_reduce)

    def whole(self, totals: Sequence[Total]) -> list[Tensor]:
        """Give the sums over all processes, rounded at the end only: the same for any number of processes."""
        if self.count == 1:
            return [total.rounded for total in totals]
        with _others():
            return [self._whole(total) for total in totals]

    def _whole(self, mine: Total) -> Tensor:
        made = Total(mine.sum)
        for rank in range(self.count):
            parts = [part if rank == self.rank else torch.empty_like(part) for part in (mine.sum, mine.rest)]
            for part in parts:
                _in_place_(part, lambda held, rank=rank: dist.broadcast(held, rank))
            made.add_total_(*parts)
        return made.rounded

    def same_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by the one of the first process."""
        if self.count > 1:
            with _others(), torch.no_grad():
                for one in tensors:
                    _in_place_(one, lambda held: dist.broadcast(held, 0))

    def told(self, value: Value) -> Value:
        """Give what the first process has."""
        if self.count == 1:
            return value
        held = [value]
        with _others():
            dist.broadcast_object_list(held, 0)
        return held[0]

    def gathered(self, value: Value) -> list[Value]:
        """Give what every process has, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _others():
            dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """End in all processes if what is done inside fails in one of them; nothing may be added up inside.

        Raises:
            FitError: another process failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.count == 1:
                raise
            error = raised
        if self.count > 1:
            self._compare(error)

    def _compare(self, error: Exception | None) -> None:
        found: list[Any] = [None] * self.count
        with _others():
            dist.all_gather_object(found, None if error is None else _in_words(error))
        if error is not None:
            raise error
        for rank, words in enumerate(found):
            if words is not None:
                is_data, problem, todo = words
                raise (DataError if is_data else FitError)(f"process {rank} of {self.count}: {problem}", todo=todo)


ALONE = Processes()


@contextlib.contextmanager
def joined(device: torch.device | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, or those that the user has joined already.

    Each of them takes the GPU of its own number where no number is given.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or not dist.is_available():
        yield ALONE
        return
    is_gpu = device is not None and device.type == "cuda"
    if device is not None and is_gpu and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """Say in one line that another process cannot be reached, as when it was killed."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one for a connection that ends
        raise FitError(
            "another process cannot be reached, or has ended",
            todo="See what it printed, and start all of them again; --resume goes on from the last finished layer.",
        ) from error


def _in_place_(tensor: Tensor, work: Any) -> None:
    """Do something to a tensor that processes have in common; NCCL alone takes none on the CPU."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl" and "gloo" not in str(dist.get_backend_config()):
        held = tensor.cuda()
        work(held)
        tensor.copy_(held)
        return
    held = tensor.detach().contiguous()
    work(held)
    if held.data_ptr() != tensor.data_ptr():
        tensor.copy_(held)


def _in_words(error: Exception) -> tuple[bool, str, str]:
    if isinstance(error, SurgeonError):
        return isinstance(error, DataError), error.problem, error.todo
    lines = str(error).splitlines() or [type(error).__name__]
    return False, lines[0].rstrip("."), "See what that process printed."
