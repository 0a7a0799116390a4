"""A kernel as a sum of scaled kernels, and what a gradient of it is to each of them.

    K = s₀ ⊙ F₀ + Σ s_i ⊙ (F_i at its window),    s_i a number for each filter

    ∂F₀ = s₀ ⊙ G,   ∂F_i = s_i ⊙ (G in the window),   ∂s_i = Σ (G in the window)·F_i for each filter,   G = ∂K

A part that is smaller than its window has the same number at every tap of it; the identity has a 1 where a filter sees
the channel of its own number. What is made is as large as the kernel, and nothing is padded: a part is added in place
where it lies, and reads its gradient there, so that all of it is a few passes over one kernel. Written with F.pad, the
same sum takes a copy of the kernel for each part, and two more for each in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # of a kernel: the first row and column, and how many of each


def scaled_sum(scale: Tensor, weight: Tensor, parts: Sequence[Tensor | None], windows: Sequence[Window]) -> Tensor:
    """Add scaled parts to a scaled kernel.

    scale (1 + parts, out), weight (out, in/groups, kh, kw); a part is (out or 1, in/groups or 1, h, w), as large as its
    window or with one tap, or None for the identity, whose window has one tap → (out, in/groups, kh, kw).

    >>> parts, windows = [torch.ones(1, 1, 1, 3)], [(1, 0, 1, 3)]
    >>> scaled_sum(torch.tensor([[1.0], [5.0]]), torch.ones(1, 1, 3, 3), parts, windows)[0, 0]
    tensor([[1., 1., 1.],
            [6., 6., 6.],
            [1., 1., 1.]])
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call] # a trace cannot be saved with a function of Python's in it
        return added_up(scale, weight, list(parts), list(windows))
    made: Tensor = _ScaledSum.apply(tuple(windows), scale, weight, *parts)
    return made


def added_up(
    scale: Tensor, weight: Tensor, parts: list[Tensor | None], windows: list[tuple[int, int, int, int]]
) -> Tensor:
    """Do the same with steps that torch.jit.script compiles and every transformation of torch knows."""
    kernel = weight * scale[0][:, None, None, None]
    for i, part in enumerate(parts):
        row, column, height, width = windows[i]
        factor = scale[i + 1][:, None, None, None]
        added = factor * identity_of(weight) if part is None else factor * part
        added = added.expand(weight.size(0), weight.size(1), height, width)
        right, below = weight.size(3) - column - width, weight.size(2) - row - height
        kernel = kernel + torch.nn.functional.pad(added, (column, right, row, below))  # last axis first
    return kernel


def identity_of(weight: Tensor) -> Tensor:
    """Make the 1×1 kernel that leaves a map as it is, for a conv of a weight: (out, in/groups, 1, 1)."""
    channels = weight.size(1)
    one = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    return one.repeat(weight.size(0) // channels, 1)[:, :, None, None]


def in_a_row(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Give the kernel of a 1×1 conv followed by another conv: their product as matrices over channels.

    first (m, in/groups, 1, 1), second (out, m/groups, kh, kw) → (out, in/groups, kh, kw). Under autocast, too, it is
    computed in the dtype of the kernels: what is cast is their sum.
    """
    rows = second.permute(0, 2, 3, 1).reshape(groups, -1, second.shape[1])  # (groups, out/groups·kh·kw, m/groups)
    kind = rows.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if is_cast else nullcontext():
        made = rows @ first.view(groups, second.shape[1], -1)
    return made.view(second.shape[0], *second.shape[2:], -1).permute(0, 3, 1, 2)


class _ScaledSum(torch.autograd.Function):
    """The sum with the gradients at the top of this file; they can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(windows: Sequence[Window], scale: Tensor, weight: Tensor, *parts: Tensor | None) -> Tensor:
        kernel = weight * scale[0][:, None, None, None]
        for number, (part, window) in enumerate(zip(parts, windows, strict=True), start=1):
            if part is None:
                _diagonal(_within(kernel, window)).add_(scale[number].view(-1, weight.shape[1]))
            else:
                _within(kernel, window).addcmul_(part, scale[number][:, None, None, None])
        return kernel

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.windows, scale, weight, *parts = inputs
        ctx.save_for_backward(scale, weight, *parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight, *parts = ctx.saved_tensors
        gradient, wants = gradients[0], ctx.needs_input_grad
        of_scales, own = _of_scale(gradient, weight) if wants[1] else ([], None)
        found: list[Tensor | None] = [_times(gradient, scale[0], into=own) if wants[2] else None]
        for number, (part, window) in enumerate(zip(parts, ctx.windows, strict=True), start=1):
            inside = _within(gradient, window)
            if part is None:
                of_scales += [_diagonal(inside).flatten()] if wants[1] else []
                found.append(None)
                continue
            if part.shape[2:] != inside.shape[2:]:  # one tap for all of the window
                inside = inside.sum((2, 3), keepdim=True)
            of_one, own = _of_scale(inside, part) if wants[1] else ([], None)
            of_scales += of_one
            found.append(_times(inside, scale[number], into=own) if wants[number + 2] else None)
        return None, torch.stack(of_scales) if wants[1] else None, *found


def _of_scale(gradient: Tensor, part: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Give the gradient of a scale, and the memory that it took, if that can be written again."""
    product = gradient * part
    return [product.sum((1, 2, 3))], None if torch.is_grad_enabled() else product


def _times(gradient: Tensor, scale: Tensor, *, into: Tensor | None) -> Tensor:
    """Scale every filter. Memory that was just written is faster than new memory, which the system has to clear."""
    return torch.mul(gradient, scale[:, None, None, None], out=into)


def _within(kernel: Tensor, window: Window) -> Tensor:
    """Look at some rows and columns of a kernel."""
    row, column, height, width = window
    return kernel.narrow(2, row, height).narrow(3, column, width)


def _diagonal(tap: Tensor) -> Tensor:
    """Look at what each filter of one tap (out, in/groups, 1, 1) has for its own channel: (groups, in/groups)."""
    channels = tap.shape[1]
    return tap[:, :, 0, 0].view(-1, channels, channels).diagonal(dim1=1, dim2=2)
