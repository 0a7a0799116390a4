"""Where the Triton kernels are used: on CUDA, if Triton is installed; everywhere else the same is done in plain torch.

Triton itself is imported by the kernels alone, when the first of them runs.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

on_cpu = False  # tests set this, under TRITON_INTERPRET=1: then kernels run on the CPU, step by step


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # no cached function: torch.compile would look into it


def has_triton() -> bool:
    return _HAS_TRITON


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether a kernel may run on these tensors: all on one CUDA device, and no gradient is asked for."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    if torch.compiler.is_exporting() or not has_triton():
        return False
    return all(is_place(t) and t.device == given[0].device for t in given)


def is_place(x: Tensor) -> bool:
    """Whether kernels run where a tensor lies."""
    return x.is_cuda or (on_cpu and x.device.type == "cpu")
