"""Products and quotients of two maps, or of a map and numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from surgeon.conv.streams import others, take
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes, listed

FUNCTIONS = {operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div}
METHODS = {"mul", "mul_", "div", "div_"}


class Product(StreamRule):
    """join(h, l) · join(h', l') = join(h · h', l · l'), and the same for a number, or one per channel."""

    name = "product"

    def matches(self, step: Step) -> bool:
        return step.calls((), FUNCTIONS, METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Let through two maps with the same low channels, or a map and numbers (one for all, or one per channel)."""
        nodes = [value for value in step.operands if isinstance(value, fx.Node)]
        maps = [layouts[value] for value in nodes if not layouts[value].is_point]
        points = [layouts[value] for value in nodes if layouts[value].is_point]
        if not any(layout.low for layout in maps):
            channels = next((one.channels for one in maps + points if one.channels), None)
            return Flow(Layout(channels, is_point=bool(points) and not maps))
        first = maps[0]
        is_alike = all((one.low, one.is_fine) == (first.low, first.is_fine) for one in maps)
        if is_alike and all(one.channels in (first.channels, 1) or one.low == first.low for one in points):
            return Flow(first)
        channels = next((one.channels for one in maps if one.channels), None)
        joined = whole_map(step, layouts, Layout(channels))
        return Flow(joined.layout, joined.seam and f"'{step.name}' adds or multiplies streams with other channels")

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        highs: dict[fx.Node, fx.Node] = {}
        lows: dict[fx.Node, fx.Node] = {}
        layout = graph.layouts[step.node]
        for i, value in enumerate(step.operands):
            if not isinstance(value, fx.Node):
                continue
            if value in graph.streams and graph.layouts[value].low == layout.low:
                pair = graph.own(graph.streams[value], step) if i == 0 else graph.streams[value]
                highs[value], lows[value] = pair.high, pair.low
            elif graph.layouts[value].channels != 1:
                whole = graph.whole(value, f"'{step.name}' reads it")
                rest = others(layout.low, layout.channels or 0)
                highs[value] = graph.call(take, whole, listed(rest), -3)
                lows[value] = graph.call(take, whole, listed(layout.low), -3)
        return StreamNodes(graph.again(step, highs), graph.again(step, lows))
