"""OctaveStep: an OctaveConv as it is deployed, with all that lies between it and the next conv.

    (high, low) = f(core(h, l) + (beside_high, beside_low))

`core` is the octave conv, `beside` another pair, such as that of a shortcut, and f an activation. What a step gives the
next one is (high, low), or (high, low, stack), where the stack is pool(high) and low one behind the other: all that
convs at half the resolution read.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.two_streams import Streams, TwoStreams
from surgeon.conv import streams
from surgeon.conv.streams import Ranges

if TYPE_CHECKING:
    from surgeon.blocks.octave import OctaveConv

Given = Sequence[Tensor | None]  # (high, low), or (high, low, stack)


class OctaveStep(TwoStreams):
    """An OctaveConv to deploy: (n, c_in, h, w) → (n, c_out, h', w'), or streams → streams."""

    form: ClassVar[str]  # as a history calls it

    def __init__(self, block: OctaveConv) -> None:
        super().__init__()
        self.spec, self.downsample = block.spec, block.downsample
        self.low_in, self.low_out = block.low_in, block.low_out
        if block.permuted_as:
            self.permuted_as = block.permuted_as
        self.train(block.training)

    def forward(self, input: Any, beside: Any = None, then: str = "", instead_of: str = "") -> Any:
        """Convolve a map to a map, or streams to streams.

        `then` is one of `one_pass.streams.ACTIVATIONS`; the module whose activation that is, which is not called, is
        named in graphs (`instead_of`), so that what a conv does besides can be taken out of its call again.
        """
        if not isinstance(input, Tensor):
            return self.step(input, beside, then)
        split = streams.split(input, self.low_in) if self.low_in else (input, None)
        high, low = self.core(*split)
        return high if low is None else streams.join(high, low, self.low_out)

    def branch_kernels(self) -> list[BranchKernel]:
        conv = next(one for one in self.modules() if isinstance(one, nn.Conv2d))
        kernel = torch.zeros(self.spec.weight_shape, dtype=torch.float64, device=conv.weight.device)
        for made, filters, channels in self.placed():
            if made is not None:
                rows, columns = (streams.numbers(ranges, kernel.device) for ranges in (filters, channels))
                kernel[rows[:, None], columns] += made.weight.detach().double()
        return self.by_path(kernel)

    @abc.abstractmethod
    def placed(self) -> Iterator[tuple[nn.Conv2d | None, Ranges, Ranges]]:
        """Give its convs, each with the filters and the channels of the octave conv that it has."""

    @abc.abstractmethod
    def step(self, given: Given, beside: Given | None, then: str) -> Given:
        """Convolve the streams, add those beside, and apply the activation."""

    def core(self, high: Tensor, low: Tensor | None) -> Streams:
        made, made_low, *_ = self.step((high, low), None, "")
        assert made is not None
        return made, made_low


def conv_of(block: OctaveConv, filters: Ranges, channels: Ranges, *, with_bias: bool = False) -> nn.Conv2d | None:
    """Make a plain conv at stride 1 of one or several paths of a block, if there are any."""
    if not (filters and channels):
        return None
    kernel = block.kernel(filters, channels).detach()
    bias = streams.take(block.bias, filters, 0).detach() if with_bias and block.bias is not None else None
    spec = block.spec.at_stride_1.change(c_in=kernel.shape[1], c_out=kernel.shape[0])
    return spec.build_with(kernel, bias, like=block.weight)
