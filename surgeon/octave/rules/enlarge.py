"""Enlarging a map by repeating its pixels."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from surgeon.conv.streams import halve_to
from surgeon.octave.layout import Flow, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

MODULES = {nn.Upsample, nn.UpsamplingNearest2d}
FUNCTIONS = {F.interpolate}


class Enlarge(StreamRule):
    """near(join(h, l)) = join(near(h), near(l)) for whole factors k: row i of both is row ⌊i/2k⌋ of l."""

    name = "enlarge"

    def matches(self, step: Step) -> bool:
        return step.calls(MODULES, FUNCTIONS) and _repeats(step)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        if step.operand is None or layouts[step.operand].is_point or step.others:
            return whole_map(step, layouts)
        return Flow(layouts[step.operand])

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        source = step.operand
        assert source is not None
        pair = graph.streams[source]
        high, low = (graph.again(step, {source: one}) for one in (pair.high, pair.low))
        return StreamNodes(high, low if graph.layouts[source].is_fine else graph.call(halve_to, low, high))


def _repeats(step: Step) -> bool:
    """Whether a step repeats every pixel a whole number of times."""
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    if step.module is not None:
        given = {name: getattr(step.module, name, None) for name in names}
    else:
        given = dict(zip(names, step.node.args[1:], strict=False)) | step.node.kwargs
    factors = given.get("scale_factor")
    factors = factors if isinstance(factors, list | tuple) else (factors,)
    is_whole = all(isinstance(one, int | float) and one >= 1 and one == int(one) for one in factors)
    is_nearest = given.get("mode", "nearest") == "nearest" and given.get("size") is None
    return is_whole and is_nearest and not given.get("antialias") and not given.get("recompute_scale_factor")
