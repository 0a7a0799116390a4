"""Pure arithmetic on kernels and on what they see: tensors in, tensors out, nothing read from modules.

A convolution is linear in its kernel, so a sum of convolutions that see the same pixels is one convolution with the
summed kernel, and a norm with fixed statistics is a scale and a shift of it:

    norm(F∗x + c) = γ/σ·(F∗x + c − μ) + β = (γ/σ·F)∗x + (β + (c − μ)·γ/σ),   σ = √(var + eps)

Ding et al. 2019, ACNet, arXiv:1908.03930, eq. 4–6 and section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from surgeon.conv.numbers import cast
from surgeon.conv.spec import ConvSpec, Pads, is_channels_last
from surgeon.conv.streams import writes_in_place

_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm in eval mode, as numbers (channels,); without affine parameters its weight is 1 and its bias 0."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        """Read a norm of any class that keeps running statistics; one that names no eps, as DETR's, has torch's."""
        mean, var, weight, bias = (getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        return cls(
            mean=mean,
            var=var,
            weight=weight if isinstance(weight, Tensor) else torch.ones_like(var),
            bias=bias if isinstance(bias, Tensor) else torch.zeros_like(var),
            eps=getattr(norm, "eps", _EPS),
        )

    def double(self) -> Norm:
        tensors = {f.name: getattr(self, f.name).double() for f in fields(self) if f.name != "eps"}
        return Norm(**tensors, eps=self.eps)


def fold_bn(kernel: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Fold a norm into the conv before it.

    kernel (out, in/groups, kh, kw) and bias (out,) or None give the kernel and bias of the conv that does both.

    >>> norm = Norm(mean=torch.ones(1), var=torch.ones(1) * 3, weight=torch.ones(1), bias=torch.zeros(1), eps=1.0)
    >>> fold_bn(torch.ones(1, 1, 1, 1), None, norm)
    (tensor([[[[0.5000]]]]), tensor([-0.5000]))
    """
    scale = norm.weight / torch.sqrt(norm.var + norm.eps)  # (out,)
    shift = -norm.mean if bias is None else bias - norm.mean
    return kernel * scale[:, None, None, None], norm.bias + shift * scale


def with_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a norm into the tensors of the conv before it, in float64, cast once to their dtype."""
    bias64 = None if bias is None else bias.detach().double()
    made = fold_bn(weight.detach().double(), bias64, Norm.of(norm).double())
    return cast(made[0], weight.dtype, "weight"), cast(made[1], weight.dtype, "bias")


def embed(strip: Tensor, kernel: tuple[int, int], *, row: int = 0, column: int = 0) -> Tensor:
    """Lay a small kernel into a larger one of zeros, its first tap at (row, column).

    strip (out, in/groups, h, w) → (out, in/groups, *kernel).

    >>> embed(torch.ones(1, 1, 1, 3), (3, 3), row=2)[0, 0]
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [1., 1., 1.]])
    """
    (kh, kw), (h, w) = kernel, strip.shape[2:]
    top, left = row, column
    return nn.functional.pad(strip, (left, kw - w - left, top, kh - h - top))  # F.pad takes the last axis first


def shift(x: Tensor, pads: Pads, mode: str) -> Tensor:
    """Pad where `pads` is positive, then crop where it is negative, so that reflections see the whole map."""
    top, bottom, left, right = pads
    if max(pads) > 0:
        added = [max(p, 0) for p in (left, right, top, bottom)]  # last axis first
        x = nn.functional.pad(x, added, mode="constant" if mode == "zeros" else mode)
    if pads.is_crop:
        h, w = x.shape[-2:]
        x = x[..., max(-top, 0) : h - max(-bottom, 0), max(-left, 0) : w - max(-right, 0)]
    return x


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """Run a conv of this spec with other tensors, however it pads."""
    x, spec = spec.padded(x), spec.inner
    if spec.padding_mode != "zeros":
        x, spec = shift(x, spec.pads, spec.padding_mode), spec.change(padding=(0, 0))
    return nn.functional.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def add_convolved(y: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    """y + conv(x), for the bias-free conv of this spec; in place where no gradient is asked for."""
    if not writes_in_place():
        return y + convolve(x, weight, None, spec)
    return add_convolved_(y, x, weight, spec)


def add_convolved_(y: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    """Add to `y` what a bias-free conv of this spec gives for `x`; in place, since one more feature map costs time.

    In channels_last a 1×1 conv at every pixel is a matrix product, which adds its result as it goes along.
    """
    is_product = spec.kernel == (1, 1) and spec.stride == (1, 1) and spec.groups == 1 and not any(spec.pads)
    alike = x.dtype == y.dtype == weight.dtype and is_channels_last(x) and is_channels_last(y)
    if not (is_product and alike) or torch.is_grad_enabled():
        return y.add_(convolve(x, weight, None, spec))
    pixels = y.permute(0, 2, 3, 1).view(-1, spec.c_out)
    pixels.addmm_(x.permute(0, 2, 3, 1).view(-1, spec.c_in), weight[:, :, 0, 0].t())
    return y


def add(*branches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum parallel convs, each a (kernel, bias) of the same shapes, into one."""
    kernels, biases = zip(*branches, strict=True)
    return torch.stack(kernels).sum(0), torch.stack(biases).sum(0)
