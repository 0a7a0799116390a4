"""Slices and splits of channels."""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace

import torch
from torch import fx

from surgeon.conv import streams
from surgeon.conv.streams import Ranges
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import Seam, StreamGraph, StreamNodes, listed

SPLITS, SPLIT_METHODS = {torch.split, torch.chunk}, {"split", "chunk"}
_ALL = (slice(None), slice(None, None, 1))


class Split(StreamRule):
    """split(join(h, l)): nothing is done yet; whoever takes one of the parts knows which channels it has."""

    name = "split"

    def matches(self, step: Step) -> bool:
        return step.calls((), SPLITS, SPLIT_METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        before = step.layout_before(layouts)
        parts = parts_of(step, before.channels) if step.argument(2, "dim", 0) in (1, -3) else ()
        if not parts or before.parts or not all(_takes_one(user, step) for user in step.node.users):
            return whole_map(step, layouts)
        return Flow(replace(before, channels=parts[-1][1], parts=parts))

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        assert step.operand is not None
        return graph.streams[step.operand]


class Select(StreamRule):
    """join(h, l)[channels] = join(h[channels], l[channels]); only h or up(l) where all of them are high or low."""

    name = "select"

    def matches(self, step: Step) -> bool:
        if not step.calls((), {operator.getitem}) or step.operand is None:
            return False
        return isinstance(step.node.args[1], int) or _sliced(step) is not None

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        before = step.layout_before(layouts)
        limits = _limits(step, before)
        if limits is None or (not before.parts and _is_changed(step)):
            return whole_map(step, layouts)
        low = streams.within(before.low, *limits)
        count = limits[1] - limits[0]
        low = () if streams.count(low) == count else low
        return Flow(Layout(count, low, is_fine=before.is_fine and bool(low), is_point=before.is_point))

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        assert step.operand is not None
        has_streams = step.operand in graph.streams and _limits(step, graph.layouts[step.operand]) is not None
        return None if has_streams and flow.seam is None else super().obstacle(step, flow, graph)

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes | fx.Node:
        source = step.operand
        assert source is not None
        before, pair = graph.layouts[source], graph.streams[source]
        limits = _limits(step, before)
        assert limits is not None
        high = _among(streams.others(before.low, before.channels or 0), limits)
        low = _among(before.low, limits)
        takes = [graph.call(streams.take, node, listed(taken), 1) if taken else None
                 for node, taken in ((pair.high, high), (pair.low, low))]  # fmt: skip
        if takes[1] is None:
            assert takes[0] is not None
            return takes[0]
        if takes[0] is not None:
            return StreamNodes(takes[0], takes[1], is_view=True)
        if before.is_fine:
            return takes[1]
        graph.seams.append(Seam(graph.path, "join", f"{step.said} takes low channels only"))
        return graph.call(streams.lift_to, takes[1], pair.high)


def parts_of(step: Step, channels: int | None) -> Ranges:
    """The channels of each part; nothing where they are not known."""
    given = step.argument(1, "split_size_or_sections", step.argument(1, "split_size", step.argument(1, "chunks")))
    if isinstance(given, list | tuple):
        sizes = [size for size in given if isinstance(size, int)]
        if len(sizes) != len(given) or (channels is not None and sum(sizes) != channels):
            return ()
    elif not isinstance(given, int) or channels is None or given < 1:
        return ()
    else:
        is_chunk = step.calls((), {torch.chunk}, {"chunk"})
        size = -(-channels // given) if is_chunk else given
        sizes = [min(size, channels - start) for start in range(0, channels, size)]
    borders = itertools.accumulate(sizes, initial=0)
    return tuple(itertools.pairwise(borders)) if all(sizes) else ()


def _takes_one(user: fx.Node, step: Step) -> bool:
    """Whether a step takes one of the parts, and nothing changes it in place."""
    is_one = user.op == "call_function" and user.target is operator.getitem and isinstance(user.args[1], int)
    return is_one and not _is_changed(Step(user, step.modules))


def _is_changed(step: Step) -> bool:
    """Whether the result, which is a view of what it is taken from, is changed in place."""
    return any(Step(user, step.modules).is_in_place for user in step.node.users)


def _sliced(step: Step) -> slice | None:
    """The slice of channels that is taken, if all of the other axes are."""
    index = step.node.args[1]
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(index[1], slice):
        return None
    others = [one for i, one in enumerate(index) if i != 1]
    of_ints = all(isinstance(limit, int | None) for limit in (index[1].start, index[1].stop))
    takes_all = all(one in _ALL if isinstance(one, slice) else one is Ellipsis for one in others)
    return index[1] if takes_all and isinstance(index[0], slice) and of_ints and index[1].step in (None, 1) else None


def _limits(step: Step, before: Layout) -> tuple[int, int] | None:
    """The first channel that is taken, and the first that is not any more; None where they are not known."""
    index, channels = step.node.args[1], before.channels
    if isinstance(index, int):
        return before.parts[index] if before.parts and -len(before.parts) <= index < len(before.parts) else None
    sliced = _sliced(step)
    if sliced is None or channels is None or before.parts:
        return None
    start, stop, _ = sliced.indices(channels)
    return (start, stop) if start < stop else None


def _among(ranges: Ranges, limits: tuple[int, int]) -> Ranges:
    """Which of the channels in the ranges, counted among these alone, lie within the limits."""
    found, at = [], 0
    for start, stop in ranges:
        first, last = max(start, limits[0]), min(stop, limits[1])
        found += [(at + first - start, at + last - start)] if first < last else []
        at += stop - start
    return streams.merged(found)
