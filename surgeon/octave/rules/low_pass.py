"""The low-passes that a plan has put in, where a plain map is added to an octave one."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from surgeon.conv.streams import low_pass
from surgeon.octave.layout import Flow, Layouts, Step
from surgeon.octave.rules.base import StreamRule
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class LowPass(StreamRule):
    """low_pass(x) = join(split(x))."""

    name = "low_pass"

    def matches(self, step: Step) -> bool:
        return step.calls((), {low_pass})

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        source, ranges = step.given
        assert isinstance(source, fx.Node)
        low = tuple((start, stop) for start, stop in ranges)
        return Flow(replace(layouts[source], low=low, is_fine=False))

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        assert step.operand is not None
        return graph.split(step.operand, graph.layouts[step.node].low, None)
