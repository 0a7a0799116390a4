"""The kernel that a conv of a class of its own convolves with, where its class computes that from the weight.

Weight standardisation, for one, takes the mean of every filter away at each call: what is stored is not what is used.
So such a conv is called once, on zeros, and the kernel of its convolution is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon._torch_compat import own_parts_of_a_conv
from surgeon.models.copies import in_mode, shadow
from surgeon.models.sandbox import quietly


def kernel_of(conv: nn.Conv2d) -> Tensor | str:
    """Give the kernel that a conv uses in eval mode, or say why there is none, in words that follow "it".

    >>> class Doubled(nn.Conv2d):
    ...     def forward(self, x):
    ...         return nn.functional.conv2d(x, 2 * self.weight)
    >>> conv = Doubled(3, 8, 3)
    >>> bool((kernel_of(conv) == 2 * conv.weight).all())
    True
    """
    if not own_parts_of_a_conv(type(conv)):
        return conv.weight
    sides = [dilation * (kernel - 1) + 1 for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = torch.zeros(1, conv.in_channels, *sides, dtype=conv.weight.dtype, device=conv.weight.device)
    watch = _Watch()
    try:
        with quietly(), watch:
            in_mode(shadow(conv), False)(x)
    except Exception as error:
        return f"does not run on zeros ({type(error).__name__})"
    if len(watch.kernels) != 1 or watch.kernels[0].shape != conv.weight.shape:
        return "does something else than one convolution with a kernel of the shape of its weight"
    return watch.kernels[0]


class _Watch(TorchFunctionMode):
    """Keeps the kernels of all convolutions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.kernels.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **(kwargs or {}))
