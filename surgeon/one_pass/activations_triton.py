"""The activations of `streams.ACTIVATIONS` in kernels, and their gradients. NaN stays NaN."""

# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, then: tl.constexpr):
    """Apply an activation."""
    if then == "relu":
        x = tl.where(x < 0, 0.0, x)
    if then == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    if then == "silu":
        x = x / (1 + tl.exp(-x))
    if then == "hardswish":
        gate = x + 3
        x = x * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return x


@triton.jit
def through(d, x, then: tl.constexpr):
    """Lead a gradient through an activation; `x` is what it was given, or, for the ReLUs, what it gave."""
    if then == "relu":
        d = tl.where(x <= 0, 0.0, d)
    if then == "relu6":
        d = tl.where((x <= 0) | (x >= 6), 0.0, d)
    if then == "silu":
        share = 1 / (1 + tl.exp(-x))
        d = d * share * (1 + x * (1 - share))
    if then == "hardswish":
        d = tl.where(x < -3, 0.0, tl.where(x > 3, d, d * (x / 3 + 0.5)))
    return d
