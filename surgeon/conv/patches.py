"""What the filters of a conv see: a feature map → the patches under its kernel. Tensors in, tensors out.

A conv is linear in its kernel: with the patches x of its input side by side, every output pixel is y = W x + b, where a
row of W is a filter, flattened in the order (channel, row, column) of `nn.Conv2d.weight`.
"""

from __future__ import annotations

from torch import Tensor, nn

from surgeon.conv import kernels
from surgeon.conv.spec import ConvSpec


def patches(x: Tensor, spec: ConvSpec) -> Tensor:
    """Lay the patches of (n, c_in, h, w) side by side: (n, groups, c_in/groups · kh · kw, h' · w').

    >>> import torch
    >>> spec = ConvSpec(2, 3, (3, 3), padding=(1, 1), bias=False)
    >>> conv, x = spec.build(like=torch.zeros(())), torch.randn(1, 2, 4, 5)
    >>> torch.allclose(conv.weight.flatten(1) @ patches(x, spec)[0, 0], conv(x)[0].flatten(1), atol=1e-6)
    True
    """
    x, spec = spec.padded(x), spec.inner
    x = kernels.shift(x, spec.pads, spec.padding_mode)
    found = nn.functional.unfold(x, spec.kernel, dilation=spec.dilation, stride=spec.stride)
    return found.view(len(x), spec.groups, -1, found.shape[2])


def size_of(x: Tensor, spec: ConvSpec) -> tuple[int, int]:
    """The height and width of what a conv of this spec makes of a map (n, c_in, h, w)."""
    x, spec = spec.padded(x), spec.inner
    top, bottom, left, right = spec.pads
    sides = ((x.shape[-2] + top + bottom, 0), (x.shape[-1] + left + right, 1))
    h, w = ((side - spec.dilation[i] * (spec.kernel[i] - 1) - 1) // spec.stride[i] + 1 for side, i in sides)
    return h, w
