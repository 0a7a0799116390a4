"""Convs and blocks of one stream, and octave convs that split and join for themselves."""

from __future__ import annotations

from torch import nn

from surgeon.blocks import Block
from surgeon.blocks.two_streams import TwoStreamBlock
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map


class Conv(StreamRule):
    """conv(join(h, l)): it mixes all channels, so it needs the whole map, and its output is plain."""

    name = "conv"
    carries = False

    def matches(self, step: Step) -> bool:
        if isinstance(step.module, TwoStreamBlock):
            return step.module.keeps_seams
        return isinstance(step.module, nn.Conv2d | Block)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        conv, source = step.module, step.operand
        assert isinstance(conv, nn.Conv2d | Block)
        is_pointwise = conv.kernel_size == (1, 1)
        is_point = source is not None and layouts[source].is_point and is_pointwise
        return whole_map(step, layouts, Layout(conv.out_channels, is_point=is_point))
