"""A feature map normed by its own batch, with what follows: a sum with another map, and an activation.

    y = f(a),   a = γ·(z − μ)/σ + β + s
    da = f'(a)·dy,   ds = da,   dβ = Σ da,   dγ = Σ da·(z − μ)/σ,   dz = γ/σ·(da − dβ/n − (z − μ)/σ·dγ/n)

where sums are over the n pixels of a batch. On CUDA, Triton kernels (those of `normed_sum`) read z once for its
statistics, and once more, with s, to write y. Of the forward pass z and y are kept, which are there anyway, as are the
input of a conv and of the next; f' of a ReLU is read off y, and that of another activation is found from a, which is
computed once more. Step by step there are two more maps between z and y, each written, kept and read.

Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.one_pass import normed_sum
from surgeon.one_pass.streams import ACTIVATIONS

_FROM_RESULT = ("relu", "relu6")  # what they gave says what their gradient is
Maybe = Tensor | None


class Norm(NamedTuple):
    """A batch norm in train mode. `momentum` is the share of the new batch in the running statistics, if it has any."""

    scale: Maybe
    shift: Maybe
    mean: Maybe
    var: Maybe
    momentum: float
    eps: float


def run(z: Tensor, norm: Norm, beside: Maybe, then: str) -> Tensor:
    """Norm a map (n, c, h, w), add another one of its shape, and apply one of `streams.ACTIVATIONS`.

    Running statistics are updated as torch does it.
    """
    if z.dim() != 4 or z.numel() <= z.shape[1] or (beside is not None and beside.shape != z.shape):
        return plainly(z, norm, beside, then)
    made = norm._replace(
        scale=z.new_ones(z.shape[1]) if norm.scale is None else norm.scale,
        shift=z.new_zeros(z.shape[1]) if norm.shift is None else norm.shift,
        mean=z.new_zeros(z.shape[1]) if norm.mean is None else norm.mean,
        var=z.new_zeros(z.shape[1]) if norm.var is None else norm.var,
    )
    beside = None if beside is None else normed_sum.in_format_of(beside, z)
    with torch.no_grad():
        maps = [z] if beside is None else [z, beside]
        fits = normed_sum.has_kernel(maps, *(t for t in made[:4] if t is not None))
    if not fits:
        return plainly(z, norm, beside, then)
    y: Tensor = _Normed.apply(z, made.scale, made.shift, beside, made, then)
    return y


def plainly(z: Tensor, norm: Norm, beside: Maybe, then: str) -> Tensor:
    """The same in plain torch, step by step."""
    y = F.batch_norm(z, norm.mean, norm.var, norm.scale, norm.shift, True, norm.momentum, norm.eps)
    y = y if beside is None else y + beside
    return ACTIVATIONS[then](y, inplace=False)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, shift: Tensor, beside: Maybe, norm: Norm, then: str) -> Tensor:
        running = [norm.mean, norm.var]
        y: Tensor
        y, known = normed_sum.forward_op([z], [scale, shift], running, [norm.momentum], [norm.eps], beside, then)
        ctx.eps, ctx.then = norm.eps, then
        given = beside if then not in ("", *_FROM_RESULT) else None
        ctx.save_for_backward(z, scale, shift, given, y if then in _FROM_RESULT else None, known)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
        dy, (z, scale, shift, beside, y, known) = grads[0], ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            if torch.is_grad_enabled():  # the gradients themselves are to be differentiated
                return *_again(ctx, dy), None, None
            more = bool(ctx.then) and ctx.needs_input_grad[3]  # without an activation it is dy itself
            dy = normed_sum.in_format_of(dy, z)
            found, sums = normed_sum.backward_op(dy, [z], known, beside, y, ctx.then, more)
        dbeside = found[-1] if more else dy if ctx.needs_input_grad[3] else None
        return found[0], sums[0].to(scale.dtype), sums[1].to(shift.dtype), dbeside, None, None


def _again(ctx: Any, dy: Tensor) -> list[Maybe]:
    """Give the gradients as a graph of torch's own steps."""
    z, scale, shift, beside, y, _ = ctx.saved_tensors
    given = [z, scale, shift, beside]
    norm = Norm(scale, shift, None, None, 0.0, ctx.eps)
    if ctx.then in _FROM_RESULT:  # where the sum is not known, the mask is: it has no gradient of its own
        da = torch.where((y <= 0) | (y >= 6) if ctx.then == "relu6" else y <= 0, 0, dy)
        made, above = plainly(z, norm, None, ""), da
    else:
        made, above = plainly(z, norm, beside, ctx.then), dy
    wanted = [t is not None and needed for t, needed in zip(given, ctx.needs_input_grad, strict=False)]
    asked = [t for t, is_wanted in zip(given, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(made, asked, above, create_graph=True))
    grads = [next(found) if is_wanted else None for is_wanted in wanted]
    if ctx.needs_input_grad[3] and grads[3] is None:
        grads[3] = above
    return grads
