"""What goes into a graph: its inputs, and the attributes that it reads."""

from __future__ import annotations

import torch

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule


class Input(StreamRule):
    """x is a plain map; a tensor (…, c, 1, 1) that the network holds is one number for every channel."""

    name = "input"
    carries = False

    def matches(self, step: Step) -> bool:
        return step.node.op in ("placeholder", "get_attr")

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        if step.node.op != "get_attr":
            return Flow(Layout())
        path, _, name = str(step.node.target).rpartition(".")
        value = getattr(step.modules.get(path), name, None)
        if isinstance(value, torch.Tensor) and value.dim() >= 3 and value.shape[-2:] == (1, 1):
            return Flow(Layout(value.shape[-3], is_point=True))
        return Flow(Layout())
