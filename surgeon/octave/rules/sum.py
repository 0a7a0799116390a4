"""Sums and differences of two maps, or of a map and numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.product import Product
from surgeon.octave.stream_graph import StreamGraph

FUNCTIONS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
METHODS = {"add", "add_", "sub", "sub_"}


class Sum(Product):
    """join(h, l) + join(h', l') = join(h + h', l + l'), and the same for a number, or one per channel."""

    name = "sum"

    def matches(self, step: Step) -> bool:
        return step.calls((), FUNCTIONS, METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Let a sum of two octave maps be an octave map; a plain map that is added to one has to be low-passed."""
        nodes = step.node.all_input_nodes
        octave = [value for value in nodes if layouts[value].is_octave and not layouts[value].is_point]
        plain = (
            [value for value in nodes if value not in octave and not layouts[value].scales(layouts[octave[0]])]
            if octave
            else []
        )
        if len(octave) == len(plain) == 1:  # one that poolings have brought to one resolution is plain here
            why = _unlike(step, plain[0], layouts[plain[0]], layouts[octave[0]])
            return Flow(layouts[octave[0]], why, (plain[0],))
        return super().flow(step, layouts)

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        if flow.low_pass:
            return flow.seam or f"{step.said} adds a plain map"
        return super().obstacle(step, flow, graph)


def _unlike(step: Step, plain: fx.Node, one: Layout, other: Layout) -> str | None:
    """Say why a plain map cannot be low-passed where it is added to an octave map."""
    if step.is_in_place and plain is step.operand and (plain.op == "placeholder" or step.is_read_later(plain)):
        return f"{step.said} writes its sum into a plain map that is read elsewhere, too"
    if one.channels not in (None, other.channels):
        return f"{step.said} adds a map of {one.channels} to one of {other.channels} channels"
    return None
