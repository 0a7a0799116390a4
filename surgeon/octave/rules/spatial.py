"""Pooling: steps that treat every channel by itself, and see several pixels of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from surgeon.conv.streams import crop_to, lift_to
from surgeon.octave.layout import Flow, Layouts, Step
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

MODULES = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d}
FUNCTIONS = {
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    F.lp_pool2d,
}


class Spatial(StreamRule):
    """f(join(h, l)) = (f(h), f(up(l))) side by side, and f(up(l)) = l if f turns 2×2 pixels into one."""

    name = "spatial"

    def matches(self, step: Step) -> bool:
        return step.calls(MODULES, FUNCTIONS) or (step.calls((), {torch.mean}, {"mean"}) and _is_over_pixels(step))

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Bring both to one resolution: the low channels become f(up(l)), or stay l if f halves the resolution."""
        if step.operand is None:
            return whole_map(step, layouts)
        before = layouts[step.operand]
        channels = before.channels if _gives_maps(step) else None
        return Flow(replace(before, channels=channels, is_fine=bool(before.low), is_point=_to_a_point(step)))

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        source = step.operand
        assert source is not None
        pair, layout = graph.streams[source], graph.layouts[source]
        high = graph.again(step, {source: pair.high})
        if layout.is_fine:
            return StreamNodes(high, graph.again(step, {source: pair.low}))
        if _halves(step):
            return StreamNodes(high, graph.call(crop_to, pair.low, high), is_view=True)
        lifted = graph.call(lift_to, pair.low, pair.high)
        return StreamNodes(high, graph.again(step, {source: lifted}))


def _is_over_pixels(step: Step) -> bool:
    """Whether a mean is over height and width."""
    dims = step.argument(1, "dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def _halves(step: Step) -> bool:
    """Whether a step takes the maximum or mean of the 2×2 pixels that one pixel of the low stream covers."""
    node, pool = step.node, step.module
    if pool is not None:
        names = ("kernel_size", "stride", "padding", "dilation", "return_indices", "divisor_override")
        given = {name: getattr(pool, name) for name in names if hasattr(pool, name)}
        is_pool = isinstance(pool, nn.MaxPool2d | nn.AvgPool2d)
    else:
        given = {**dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)), **node.kwargs}
        is_pool = step.calls((), {F.max_pool2d, torch.max_pool2d, F.avg_pool2d}) and len(node.args) <= 4
    usual = {"padding": 0, "dilation": 1, "return_indices": False, "divisor_override": None}
    if not is_pool or not all(
        given.get(name, value) in (value, (value,) * 2, [value] * 2) for name, value in usual.items()
    ):
        return False
    kernel = given.get("kernel_size")
    return all(value in (2, (2, 2), [2, 2]) for value in (kernel, given.get("stride") or kernel))


def _to_a_point(step: Step) -> bool:
    """Whether one pixel of every channel is left, as a map."""
    if (pool := step.module) is not None:
        return isinstance(pool, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and pool.output_size in (1, (1, 1))
    if step.calls((), {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}):
        return step.given[1:2] in ([1], [(1, 1)], [[1, 1]])
    return step.calls((), {torch.mean}, {"mean"}) and _gives_maps(step)


def _gives_maps(step: Step) -> bool:
    """Whether height and width are left, if only one pixel of them; a mean over pixels gives vectors otherwise."""
    return not step.calls((), {torch.mean}, {"mean"}) or bool(step.argument(2, "keepdim", False))
