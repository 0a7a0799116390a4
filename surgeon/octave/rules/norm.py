"""Batch norms."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from surgeon.blocks.pairs import PairNorm
from surgeon.octave.layout import Flow, Layouts, Step
from surgeon.octave.rules.base import StreamRule
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class Norm(StreamRule):
    """norm(join(h, l)) = join(norm[high] h, norm[low] l)."""

    name = "norm"
    is_channelwise = True

    def matches(self, step: Step) -> bool:
        return step.calls({nn.BatchNorm2d, PairNorm})

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        assert isinstance(step.module, nn.BatchNorm2d)
        return Flow(replace(step.layout_before(layouts), channels=step.module.num_features))

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        if why := super().obstacle(step, flow, graph):
            return why
        low = flow.layout.low
        is_taken = graph.norms.get(str(step.node.target), low) != low  # elsewhere it is called with other low channels
        return f"{step.said} needs the whole map" if is_taken else None

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        assert step.operand is not None
        pair, name = graph.streams[step.operand], str(step.node.target)
        graph.norms[name] = graph.layouts[step.node].low
        return graph.parts(graph.graph.call_module(name, ((pair.high, pair.low),)))
