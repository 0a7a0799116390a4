"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor

_LARGE = 2**20  # bytes; below that, what is kept does not matter, and giving it back costs more time than it is worth


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is so large that holding it a second time matters."""
    return tensor.numel() * tensor.element_size() >= _LARGE


def give_back_after(tensor: Tensor) -> None:
    """Give back what was freed while something was made of a large tensor.

    The C library keeps freed blocks of up to 32 MB, and what stays allocated between them (the strips of one block
    between the float64 scratch of two) keeps them from being used again: a model of one gigabyte takes four more.
    """
    if is_large(tensor) and _trim is not None:
        _trim(0)


def _found() -> Callable[[int], int] | None:
    """Find the call in glibc; other C libraries have none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_trim = _found()
