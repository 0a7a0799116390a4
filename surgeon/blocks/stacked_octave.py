"""StackedOctave: an OctaveConv in two plain convs, of which one reads all that there is at half the resolution.

The stack is pool(h) and l, one behind the other. At stride 1

    made         = W_hh ∗ h
    (extra, low) = (0  W_lh; W_hl  W_ll) ∗ stack
    high         = made + up(extra)

and at stride 2, where the high stream is pooled, and l has the resolution that it then has,

    high = (W_hh  W_lh) ∗ stack,    low = (W_hl  W_ll) ∗ pool(stack)

What is zero there costs multiply-adds (a sixteenth of the conv's at α = ½), and saves launching a conv and a pass over
memory, which is what counts on a GPU. All that is left between two convs is one pass (`one_pass.streams`).

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from surgeon.blocks.octave_step import Given, OctaveStep, conv_of
from surgeon.conv import streams
from surgeon.conv.streams import Ranges
from surgeon.one_pass.streams import activated, finish

if TYPE_CHECKING:
    from surgeon.blocks.octave import OctaveConv


class StackedOctave(OctaveStep):
    """An OctaveConv in two plain convs, to deploy. `bias` has that of the high channels first."""

    __module__ = "surgeon.nn"

    form = "stacked"

    bias: nn.Parameter | None

    def __init__(self, block: OctaveConv) -> None:
        super().__init__(block)
        high_in, high_out = streams.others(block.low_in, self.spec.c_in), streams.others(block.low_out, self.spec.c_out)
        everything, reads_stack = (*high_in, *block.low_in), self.reads_stack()
        self.high_conv = conv_of(block, high_out, everything if reads_stack else high_in)
        if reads_stack or not block.low_in:
            self.stack_conv = conv_of(block, block.low_out, everything)
        elif block.low_out:
            self.stack_conv = conv_of(block, (*high_out, *block.low_out), everything)
            assert self.stack_conv is not None
            with torch.no_grad():
                self.stack_conv.weight[: streams.count(high_out), : streams.count(high_in)] = 0
        else:  # it reads l alone
            self.stack_conv = conv_of(block, high_out, block.low_in)
        bias = None if block.bias is None else streams.take(block.bias.detach(), (*high_out, *block.low_out), 0).clone()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.train(block.training)

    def reads_stack(self) -> bool:
        """Whether the high stream is made of the stack, with no resampling."""
        return self.spec.stride == (2, 2) and self.downsample == "paper"

    def placed(self) -> Iterator[tuple[nn.Conv2d | None, Ranges, Ranges]]:
        high_in, high_out = streams.others(self.low_in, self.spec.c_in), streams.others(self.low_out, self.spec.c_out)
        everything, reads_stack = (*high_in, *self.low_in), self.reads_stack()
        yield self.high_conv, high_out, everything if reads_stack else high_in
        if reads_stack or not self.low_in:
            yield self.stack_conv, self.low_out, everything
        elif self.low_out:
            yield self.stack_conv, (*high_out, *self.low_out), everything
        else:
            yield self.stack_conv, high_out, self.low_in

    def step(self, given: Given, beside: Given | None, then: str) -> Given:
        assert self.high_conv is not None
        high, source = self._sources(given)
        made = self.high_conv(high)
        if self.stack_conv is None or source is None:
            if self.bias is not None:
                made = streams.add_into(made, self.bias[:, None, None])
            made = made if beside is None or beside[0] is None else streams.add_into(made, beside[0])
            return activated(made, then), None
        pair = None if beside is None or beside[0] is None else (beside[0], beside[-1])
        has_extra = bool(self.low_in) and not self.reads_stack()
        done, stack = finish(made, self.stack_conv(source), self.bias, pair, then, has_extra=has_extra)
        return done, streams.cut(stack, made.shape[1])[1] if self.low_out else None, stack

    def _sources(self, given: Given) -> tuple[Tensor, Tensor | None]:
        """Give what each of the two convs reads; the second reads nothing where there is none."""
        high, low = given[0], given[1]
        assert high is not None
        if self.spec.stride == (1, 1):
            return high, _stack(given) if self.low_out else low
        stack = _stack(given)
        if self.reads_stack():
            return stack, streams.pool(stack) if self.low_out else None
        pooled = stack if low is None else streams.cut(stack, high.shape[1])[0]
        if self.low_out:
            return pooled, streams.pool(stack)
        return pooled, None if low is None else streams.pool(low)


def _stack(given: Given) -> Tensor:
    """Give pool(h) and l one behind the other: what a step before has made, or a new map."""
    high, low, *made = given
    if made and made[0] is not None:
        return made[0]
    assert high is not None
    pooled = streams.pool(high)
    return pooled if low is None else torch.cat([pooled, low], 1)
