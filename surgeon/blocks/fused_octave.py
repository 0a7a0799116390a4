"""FusedOctave: an OctaveConv in plain convs, one for each path between its streams.

    high = W_hh ∗ h + up(W_lh ∗ l)
    low  = W_hl ∗ pool(h) + W_ll ∗ l

The kernels are cut out of the one kernel that the block has; `octave` says what is done at stride 2, and `octave_step`
what comes behind. This is the form with the fewest multiply-adds, which is what counts on a CPU.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from surgeon.blocks.octave_step import Given, OctaveStep, conv_of
from surgeon.conv import kernels, streams
from surgeon.conv.spec import ConvSpec
from surgeon.conv.streams import Ranges
from surgeon.one_pass.streams import activated

if TYPE_CHECKING:
    from surgeon.blocks.octave import OctaveConv


class FusedOctave(OctaveStep):
    """An OctaveConv in plain convs, one for each path, to deploy.

    Two convs that read the same low map are one (`low_to_both`), unless their kernels are 1×1: then it is faster to add
    the second one's result to what is there.
    """

    __module__ = "surgeon.nn"

    form = "paths"

    def __init__(self, block: OctaveConv) -> None:
        super().__init__(block)
        reads_once = self.spec.stride == (1, 1) or self.downsample == "pool-both"
        shares = bool(block.low_in and block.low_out) and reads_once and self.spec.kernel != (1, 1)
        high_in, high_out = streams.others(block.low_in, self.spec.c_in), streams.others(block.low_out, self.spec.c_out)
        self.high_to_high = conv_of(block, high_out, high_in, with_bias=True)
        self.high_to_low = conv_of(block, block.low_out, high_in, with_bias=True)
        self.low_to_both = conv_of(block, (*high_out, *block.low_out), block.low_in) if shares else None
        self.low_to_high = None if shares else conv_of(block, high_out, block.low_in)
        self.low_to_low = None if shares else conv_of(block, block.low_out, block.low_in)
        self.train(block.training)

    def placed(self) -> Iterator[tuple[nn.Conv2d | None, Ranges, Ranges]]:
        high_in, high_out = streams.others(self.low_in, self.spec.c_in), streams.others(self.low_out, self.spec.c_out)
        yield self.high_to_high, high_out, high_in
        yield self.high_to_low, self.low_out, high_in
        yield self.low_to_both, (*high_out, *self.low_out), self.low_in
        yield self.low_to_high, high_out, self.low_in
        yield self.low_to_low, self.low_out, self.low_in

    def step(self, given: Given, beside: Given | None, then: str) -> Given:
        assert given[0] is not None
        high, fine, low, needs_up = self.resampled(given[0], given[1])
        beside_high, beside_low = (None, None) if beside is None else (beside[0], beside[1])
        made_low = None if self.high_to_low is None else _ran(self.high_to_low, streams.pool(high))
        extra = None
        if fine is not None and self.low_to_both is not None:
            extra, across = streams.cut(self.low_to_both(fine), self.spec.c_out - streams.count(self.low_out))
            made_low = across if made_low is None else streams.add_into(made_low, across)
        elif fine is not None and low is not None:
            extra = _ran(self.low_to_high, fine)
            if self.low_to_low is not None and made_low is not None:
                spec = ConvSpec.of(self.low_to_low)
                made_low = kernels.add_convolved(made_low, low, self.low_to_low.weight, spec)
        if made_low is not None and beside_low is not None:
            made_low = streams.add_into(made_low, beside_low)
        made = self._high(high, extra, beside_high, needs_up=needs_up)
        return activated(made, then), None if made_low is None else activated(made_low, then)

    def _high(self, high: Tensor, extra: Tensor | None, beside: Tensor | None, *, needs_up: bool) -> Tensor:
        """Make the high stream; in place, the conv adds to what is made of the other two."""
        conv = self.high_to_high
        assert conv is not None
        if extra is not None and beside is not None and needs_up and streams.writes_in_place():
            start = streams.raised(extra, beside)
            if start.dtype == high.dtype == conv.weight.dtype:
                return kernels.add_convolved_(start, high, conv.weight, ConvSpec.of(conv), conv.bias)
        made = _ran(conv, high)
        if extra is not None:
            made = streams.add_up(made, extra) if needs_up else streams.add_into(made, extra)
        return made if beside is None else streams.add_into(made, beside)


def _ran(conv: nn.Conv2d | None, x: Tensor) -> Tensor:
    assert conv is not None
    made: Tensor = conv(x)
    return made
