"""A tensor of an example input that is still to be drawn: its shape, its dtype, and the distribution of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from surgeon.errors import CaptureError

Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
WHOLES = ("uint8", "int8", "int16", "int32", "int64")
_DRAWN_BELOW = 10  # whole numbers, unless a bound is given


@dataclass(frozen=True, slots=True)
class Draw:
    """A tensor still to be drawn, on the CPU: normal random numbers, or whole numbers from 0 to below `bound`."""

    shape: Shape
    dtype: torch.dtype = torch.float64
    bound: int | None = None

    @classmethod
    def like(cls, tensor: Tensor) -> Self:
        """Describe a tensor, so that what is drawn could stand in for it."""
        is_index = dtype_name(tensor.dtype) in WHOLES and tensor.numel() and not tensor.is_meta
        return cls(tuple(tensor.shape), tensor.dtype, max(1, int(tensor.max()) + 1) if is_index else None)

    def tensor(self, generator: torch.Generator) -> Tensor:
        try:
            if self.dtype.is_complex:
                return torch.randn(self.shape, generator=generator, dtype=torch.complex128, device="cpu").to(self.dtype)
            if self.dtype.is_floating_point:
                return torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
            below = 2 if self.dtype == torch.bool else self.bound or _DRAWN_BELOW
            return torch.randint(below, self.shape, generator=generator, device="cpu").to(self.dtype)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # a TypeError is beyond 64 bits
            sides = "×".join(map(str, self.shape))
            raise CaptureError(f"an input of {sides} does not fit into memory", todo="Give a smaller shape.") from error

    def __str__(self) -> str:
        sides = ",".join(map(str, self.shape)) or "()"
        dtype = "" if self.dtype.is_floating_point else f":{dtype_name(self.dtype)}"
        return sides + dtype + (f"<{self.bound}" if self.bound is not None else "")


def dtype_name(dtype: torch.dtype) -> str:
    """How the notation calls a dtype.

    >>> dtype_name(torch.int64)
    'int64'
    """
    return str(dtype).removeprefix("torch.")
