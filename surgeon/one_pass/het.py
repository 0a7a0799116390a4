"""A HetConv in one pass over memory: off the centre the taps of a group of channels, in the centre those of all.

    y_i = Σ_{t ≠ centre} Σ_{j ∈ S(i)} F_ijt · x_j(t) + Σ_j w_ij · x_j(centre) + b_i

On CUDA, in channels_last, one Triton kernel reads the map and writes the result. In plain torch they are a conv in
groups, a 1×1 conv, a sum, and gathers around the first where groups are no runs of channels.

Singh et al. 2019, HetConv, arXiv:1903.04120, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon._torch_compat import has_dispatch_modes
from surgeon.one_pass.where import uses_triton

_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def has_kernel(x: Tensor, weight: Tensor, pointwise: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel can do it: (n, in, h, w) in channels_last, (out, in/P, kh, kw), (out, in), all of one dtype.

    Where somebody watches operators, such as a counter of costs, they are to see the convs that they know; and under
    autocast, which the kernel does not know, convs are cast.
    """
    if not uses_triton(x, weight, pointwise, *others) or torch.is_autocast_enabled(x.device.type):
        return False
    if not torch.compiler.is_compiling() and has_dispatch_modes():
        return False
    known = x.dim() == 4 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)
    alike = x.dtype in _DTYPES and {t.dtype for t in (weight, pointwise)} == {x.dtype}
    return known and alike and pointwise.is_contiguous() and pointwise.shape == (weight.shape[0], x.shape[1])


def _empty(
    x: Tensor,
    weight: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    channel_order: Tensor | None,
    filter_order: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Make the memory of a result, in channels_last."""
    kernel = weight.shape[2:]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return x.new_empty((x.shape[0], weight.shape[0], height, width)).to(memory_format=torch.channels_last)


def _convolve(
    x: Tensor,
    weight: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    channel_order: Tensor | None,
    filter_order: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    from surgeon.one_pass import het_triton

    y = _empty(x, weight, pointwise, bias, channel_order, filter_order, stride, padding, dilation)
    het_triton.convolve_(y, x, weight, pointwise, bias, channel_order, filter_order, stride, padding, dilation)
    return y


# torch.compile looks into this one, and compiles the kernel together with what is around it.
convolve_op: Any = torch.library.triton_op(
    "surgeon::het_conv",
    _convolve,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor pointwise, Tensor? bias, Tensor? channel_order, Tensor? filter_order, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor",
)

convolve_op.register_fake(_empty)
