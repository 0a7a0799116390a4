"""Concatenations of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.conv.streams import merged, moved
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

FUNCTIONS = {torch.cat, torch.concat}


class Concat(StreamRule):
    """cat(join(h, l), x) = join(cat(h, x), l), with the low channels at their new places."""

    name = "concat"

    def matches(self, step: Step) -> bool:
        return step.calls((), FUNCTIONS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Put the channels side by side; those of a plain map are all high."""
        parts = _parts(step)
        is_of_channels = step.argument(1, "dim", 0) in (1, -3)
        if not is_of_channels or not parts or not all(isinstance(part, fx.Node) for part in parts):
            return whole_map(step, layouts)
        found = [layouts[part] if layouts[part].is_octave else layouts[part].plain for part in parts]
        counts = [one.channels for one in found]
        if any(count is None for count in counts):
            joined = whole_map(step, layouts)
            why = f"the number of channels that {step.said} puts side by side is not known"
            return Flow(joined.layout, joined.seam and why)
        low: list[tuple[int, int]] = []
        at = 0
        for one, count in zip(found, counts, strict=True):
            low += moved(one.low, at)
            at += count or 0
        return Flow(Layout(at, merged(low), is_point=all(one.is_point for one in found)))

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        highs, lows = [], []
        for part in _parts(step):
            if part in graph.streams and graph.layouts[part].is_octave:
                highs.append(graph.streams[part].high)
                lows.append(graph.streams[part].low)
            else:
                highs.append(graph.whole(part, f"{step.said} reads it"))
        return StreamNodes(graph.call(torch.cat, highs, 1), graph.call(torch.cat, lows, 1))


def _parts(step: Step) -> list[Any]:
    given = step.argument(0, "tensors")
    return list(given) if isinstance(given, list | tuple) else []
