"""FusedOctave: an OctaveConv in plain convs, one for each path between its streams.

    high = W_hh ∗ h + up(W_lh ∗ l)
    low  = W_hl ∗ pool(h) + W_ll ∗ l

The kernels are cut out of the one kernel that the block has; `octave` says what is done at stride 2.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from surgeon.blocks.two_streams import Streams, TwoStreams
from surgeon.conv import kernels, streams
from surgeon.conv.spec import ConvSpec
from surgeon.conv.streams import Ranges

if TYPE_CHECKING:
    from surgeon.blocks.octave import OctaveConv


class FusedOctave(TwoStreams):
    """An OctaveConv in plain convs, one for each path, to deploy.

    Two convs that read the same low map are one (`low_to_both`), unless their kernels are 1×1: then it is faster to add
    the second one's result, in a matrix product, to what is there.
    """

    __module__ = "surgeon.nn"

    def __init__(self, block: OctaveConv) -> None:
        super().__init__()
        self.spec, self.downsample = block.spec, block.downsample
        self.low_in, self.low_out = block.low_in, block.low_out
        if block.permuted_as:
            self.permuted_as = block.permuted_as
        reads_once = self.spec.stride == (1, 1) or self.downsample == "pool-both"
        shares = bool(block.low_in and block.low_out) and reads_once and self.spec.kernel != (1, 1)
        high_in, high_out = streams.others(block.low_in, self.spec.c_in), streams.others(block.low_out, self.spec.c_out)
        self.high_to_high = _conv(block, high_out, high_in, with_bias=True)
        self.high_to_low = _conv(block, block.low_out, high_in, with_bias=True)
        self.low_to_both = _conv(block, (*high_out, *block.low_out), block.low_in) if shares else None
        self.low_to_high = None if shares else _conv(block, high_out, block.low_in)
        self.low_to_low = None if shares else _conv(block, block.low_out, block.low_in)
        self.train(block.training)

    def core(self, high: Tensor, low: Tensor | None) -> Streams:
        high, fine, low, needs_up = self.resampled(high, low)
        made: Tensor = _ran(self.high_to_high, high)
        made_low = None if self.high_to_low is None else _ran(self.high_to_low, streams.pool(high))
        if fine is None or low is None:
            return made, made_low
        if self.low_to_both is not None:
            both = self.low_to_both(fine)
            border = made.shape[1]
            assert made_low is not None
            made_low = streams.add_into(made_low, both[:, border:])
            extra = both[:, :border]
        else:
            extra = _ran(self.low_to_high, fine)
            if self.low_to_low is not None and made_low is not None:
                spec = ConvSpec.of(self.low_to_low)
                made_low = kernels.add_convolved(made_low, low, self.low_to_low.weight, spec)
        return streams.add_up(made, extra) if needs_up else streams.add_into(made, extra), made_low


def _ran(conv: nn.Conv2d | None, x: Tensor) -> Tensor:
    assert conv is not None
    made: Tensor = conv(x)
    return made


def _conv(block: OctaveConv, filters: Ranges, channels: Ranges, *, with_bias: bool = False) -> nn.Conv2d | None:
    """Make a plain conv of one or two paths of a block, if there are any."""
    if not (filters and channels):
        return None
    kernel = block.kernel(filters, channels).detach()
    bias = streams.take(block.bias, filters, 0).detach() if with_bias and block.bias is not None else None
    spec = block.spec.at_stride_1.change(c_in=kernel.shape[1], c_out=kernel.shape[0])
    return spec.build_with(kernel, bias, like=block.weight)
