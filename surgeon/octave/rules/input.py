"""What goes into a graph: its inputs, and the attributes that it reads."""

from __future__ import annotations

import torch

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule


class Input(StreamRule):
    """x is a plain map; what the network holds is a map, one number for every channel (…, c, 1, 1), or a number."""

    name = "input"
    carries = False

    def matches(self, step: Step) -> bool:
        return step.node.op in ("placeholder", "get_attr")

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        if step.node.op != "get_attr":
            return Flow(Layout())
        path, _, name = str(step.node.target).rpartition(".")
        value = getattr(step.modules.get(path), name, None)
        if isinstance(value, bool | int | float):
            return Flow(Layout(1, is_point=True))
        if not isinstance(value, torch.Tensor) or value.dim() > 4:
            return Flow(Layout())
        c, h, w = (1, 1, 1, *value.shape)[-3:]  # as it broadcasts
        return Flow(Layout(c, is_point=(h, w) == (1, 1)))
