"""Pure arithmetic on kernels and on what they see: tensors in, tensors out, nothing read from modules.

A convolution is linear in its kernel, so a sum of convolutions that see the same pixels is one convolution with the
summed kernel, and a norm with fixed statistics is a scale and a shift of it:

    norm(F∗x + c) = γ/σ·(F∗x + c − μ) + β = (γ/σ·F)∗x + (β + (c − μ)·γ/σ),   σ = √(var + eps)

Ding et al. 2019, ACNet, arXiv:1908.03930, eq. 4–6 and section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from surgeon._torch_compat import add_conv_
from surgeon.conv.numbers import cast
from surgeon.conv.spec import ConvSpec, Pads, is_channels_last
from surgeon.conv.streams import writes_in_place

_LARGEST_SHARE = 16.0  # of a strip in a kernel that keeps the first branch's scale
_LARGEST_VARIANCE = 2.0**15  # float16 ends at twice that
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

    @classmethod
    def behind(cls, conv: nn.Conv2d, norm: nn.Module) -> Norm:
        """Read a norm that has taken in the bias of the conv before it, in float64."""
        numbers = cls.of(norm).double()
        return numbers if conv.bias is None else replace(numbers, mean=numbers.mean - conv.bias.double())

    def write_(self, norm: nn.Module) -> None:
        """Give these numbers to a norm, cast once to its dtypes; what it does not have is left out.

        Raises:
            PlanError: a dtype does not hold one of them.
        """
        stored = {"running_mean": self.mean, "running_var": self.var, "weight": self.weight, "bias": self.bias}
        for name, numbers in stored.items():
            if (tensor := getattr(norm, name)) is not None:
                tensor.copy_(cast(numbers, tensor.dtype, name))

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


def keep_bn(
    branches: Sequence[tuple[Tensor, Norm]], *, scales: bool = True, shifts: bool = True
) -> tuple[Tensor, Norm]:
    """Sum parallel convs that have a norm each, into one conv without bias and one norm behind it.

    Each branch is a kernel (out, in/groups, kh, kw), all of one shape, and its norm; all are float64. With the scale
    s_i = γ_i/√(v_i + ε_i) of each branch the sum is Σ s_i·(F_i∗x − μ_i) + β_i (Ding et al. 2019, eq. 4–6). It is also

        s·(F∗x − μ) + β,   F = Σ s_i/s·F_i,   μ = Σ s_i/s·μ_i,   β = Σ β_i

    for any s, so s is chosen channel by channel. It is s_0, the first branch's own, where |s_0| is at least 1/16 of the
    largest of the other scales, and 1 elsewhere: no kernel is divided by next to nothing. μ is then the mean of F∗x.
    Its variance is not known, as nothing is known of how the branches are correlated; it is taken as if they were not:

        v = Σ (s_i/s)²·v_i,   γ = s·√(v + ε_0)

    Where the scales of the other branches are 0, this is the first branch, bit for bit. Where v would be too large for
    float16, s is 1, too. Without `scales` γ is 1: then v = v_0 and s = 1/√(v_0 + ε_0). Without `shifts` β is 0, and μ
    takes its place: μ = Σ s_i/s·μ_i − β_i/s.

    >>> norm = Norm(*(torch.tensor([n], dtype=torch.float64) for n in (1.0, 3.0, 2.0, 5.0)), eps=1.0)
    >>> kernel, made = keep_bn([(torch.ones(1, 1, 1, 1), norm), (torch.ones(1, 1, 1, 1), norm)])
    >>> kernel.item(), made.mean.item(), made.var.item(), made.bias.item()
    (2.0, 2.0, 6.0, 10.0)
    """
    norms = [norm for _, norm in branches]
    first, means, betas = norms[0], torch.stack([n.mean for n in norms]), torch.stack([n.bias for n in norms])
    keeps, shares, scale, var = _shares(norms, scales=scales, shifts=shifts)
    kernel = torch.stack([one * share[:, None, None, None] for (one, _), share in zip(branches, shares, strict=True)])
    mean, bias, weight = (shares * means).sum(0), betas.sum(0), torch.ones_like(first.weight)
    if scales:
        kept = first.weight * torch.sqrt((var + first.eps) / (first.var + first.eps))  # exact where var is the first's
        weight = torch.where(keeps, kept, torch.sqrt(var + first.eps))
    if not shifts:
        mean, bias = mean - bias / scale, torch.zeros_like(bias)
    return kernel.sum(0), Norm(mean, var, weight, bias, first.eps)


def _shares(norms: Sequence[Norm], *, scales: bool, shifts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose s for each channel; returns where it is s_0, s_i/s (branches, out), s, and the variance of F∗x."""
    own_scales = torch.stack([norm.weight / torch.sqrt(norm.var + norm.eps) for norm in norms])
    first, others = own_scales[0], own_scales[1:].abs().amax(0)
    variances, one = torch.stack([norm.var for norm in norms]), torch.ones_like(first)
    divisor = torch.where(first == 0, one, first)  # whatever comes after a scale of 0 adds nothing
    shares = torch.cat([one[None], own_scales[1:] / divisor])
    var = (shares.square() * variances).sum(0)
    keeps = (first.abs() * _LARGEST_SHARE >= others) & ((var <= _LARGEST_VARIANCE) | (others == 0))
    if not scales:
        scale = 1 / torch.sqrt(norms[0].var + norms[0].eps)
        return torch.ones_like(keeps), own_scales / scale, scale, variances[0]
    if not shifts:
        keeps &= first != 0
    alone = (own_scales.square() * variances).sum(0)
    scale, var = torch.where(keeps, divisor, one), torch.where(keeps, var, alone)
    return keeps, torch.where(keeps, shares, own_scales), scale, var


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


def add_convolved_(y: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, bias: Tensor | None = None) -> Tensor:
    """Add to `y` what a conv of this spec gives for `x`; in place, since one more feature map costs time.

    On the CPU, in channels_last, a conv can add its result as it goes along; a 1×1 conv of one image is faster as a
    matrix product over the pixels, which can do that, too.
    """
    if torch.is_grad_enabled():
        return y.add_(convolve(x, weight, bias, spec))
    is_product = spec.kernel == (1, 1) and spec.stride == (1, 1) and spec.groups == 1 and not any(spec.pads)
    is_product &= bias is None and is_channels_last(x) and is_channels_last(y) and x.dtype == y.dtype == weight.dtype
    if not (is_product and len(x) == 1) and _add_conv_(y, x, weight, bias, spec):
        return y
    if not is_product:
        return y.add_(convolve(x, weight, bias, spec))
    pixels = y.permute(0, 2, 3, 1).view(-1, spec.c_out)
    pixels.addmm_(x.permute(0, 2, 3, 1).view(-1, spec.c_in), weight[:, :, 0, 0].t())
    return y


def _add_conv_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> bool:
    """Let the conv add its result to `y` by itself, and say whether it can."""
    top, bottom, left, right = spec.pads
    if spec.pads_input is not None or spec.padding_mode != "zeros" or (top, left) != (bottom, right):
        return False
    how = {"padding": (top, left), "stride": spec.stride, "dilation": spec.dilation}
    return add_conv_(y, x, weight, bias, **how, groups=spec.groups)


def add(*branches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum parallel convs, each a (kernel, bias) of the same shapes, into one."""
    kernels, biases = zip(*branches, strict=True)
    return torch.stack(kernels).sum(0), torch.stack(biases).sum(0)
