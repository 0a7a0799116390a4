"""The convs that two streams go through themselves."""

from __future__ import annotations

import operator

from torch import fx

from surgeon.blocks.two_streams import TwoStreamBlock
from surgeon.conv.streams import Ranges
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class Octave(StreamRule):
    """conv(join(h, l)) = join(core(split(join(h, l)))) = join(core(h, l))."""

    name = "octave"
    carries = False

    def matches(self, step: Step) -> bool:
        return isinstance(step.module, TwoStreamBlock) and not step.module.keeps_seams

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        block = _block(step)
        return Flow(Layout(block.spec.c_out, block.low_out), _unfit(step, layouts, block.low_in))

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        return None  # streams that are missing are made

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes | None:
        block, source = _block(step), step.operand
        assert source is not None
        if not (block.low_in or block.low_out):
            step.node.replace_input_with(source, graph.whole(source, "it reads high channels only"))
            return None
        if block.low_in:
            pair = graph.split(source, block.low_in, self.flow(step, graph.layouts).seam)
            given: tuple[fx.Node, fx.Node | None] = (pair.high, pair.low)
        else:
            given = (graph.whole(source, f"{step.said} reads high channels only"), None)
        both = graph.graph.call_module(str(step.node.target), (given,))
        if block.low_out:
            return graph.parts(both)
        graph.replace_(step.node, graph.call(operator.getitem, both, 0))
        graph.fired[self.name] += 1
        return None


def _block(step: Step) -> TwoStreamBlock:
    assert isinstance(step.module, TwoStreamBlock)
    return step.module


def _unfit(step: Step, layouts: Layouts, wanted: Ranges) -> str | None:
    """Say why the streams before a conv are not those it reads."""
    found = step.layout_before(layouts)
    if found.low == wanted or (found.is_fine and not wanted):
        return None
    if not found.low:
        return "it reads a plain map"
    return "it reads other low channels than its input has" if wanted else "it reads high channels only"
