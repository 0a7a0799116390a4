"""Products and quotients of two maps, or of a map and numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from surgeon.octave.layout import Flow, Layouts, Step, broadcast
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

FUNCTIONS = {operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div}
METHODS = {"mul", "mul_", "div", "div_"}


class Product(StreamRule):
    """join(h, l) · join(h', l') = join(h · h', l · l'), and the same for a number, or one per channel."""

    name = "product"

    def matches(self, step: Step) -> bool:
        return step.calls((), FUNCTIONS, METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Let through two maps with the same low channels, or a map and numbers (one for all, or one per channel)."""
        nodes = step.node.all_input_nodes
        if not any(layouts[value].low for value in nodes if not layouts[value].is_point):
            return _of_points(step, layouts)
        maps = [layouts[value] for value in nodes if not layouts[value].is_point]
        points = [layouts[value] for value in nodes if layouts[value].is_point]
        first = maps[0]
        is_alike = all((one.low, one.is_fine) == (first.low, first.is_fine) for one in maps)
        if is_alike and all(one.scales(first) or one.low == first.low for one in points):
            return Flow(first)
        joined = whole_map(step, layouts, broadcast(layouts[value].plain for value in nodes))
        return Flow(joined.layout, joined.seam and f"{step.said} adds or multiplies streams with other channels")

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        highs: dict[fx.Node, fx.Node] = {}
        lows: dict[fx.Node, fx.Node] = {}
        layout = graph.layouts[step.node]
        for value in step.node.all_input_nodes:
            if value in graph.streams and graph.layouts[value].low == layout.low:
                pair = graph.own(graph.streams[value], step) if value is step.operand else graph.streams[value]
                highs[value], lows[value] = pair.high, pair.low
            else:
                highs[value], lows[value] = graph.parted(value, layout)
        return StreamNodes(graph.again(step, highs), graph.again(step, lows))


def _of_points(step: Step, layouts: Layouts) -> Flow:
    """Give the result of plain maps, and of points whose channels were two streams."""
    return Flow(broadcast(layouts[value].plain for value in step.node.all_input_nodes))
