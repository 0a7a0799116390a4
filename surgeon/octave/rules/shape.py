"""What is asked of a map besides its numbers: its size, its dtype, its device."""

from __future__ import annotations

import builtins
import operator
from typing import Any

from torch import fx

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules.base import StreamRule
from surgeon.octave.stream_graph import StreamGraph

_OF_ANY_STREAM = {"dtype", "device", "ndim"}
_NOT_CHANNELS = (0, 2, 3, -1, -2, -4)


class Shape(StreamRule):
    """size(join(h, l)) = size(h), but for the number of channels; and the same for dtype and device."""

    name = "shape"
    carries = False

    def matches(self, step: Step) -> bool:
        node = step.node
        if node.op == "call_method" and node.target == "size":
            asked = step.argument(1, "dim")
            return _is_of_others(asked) if asked is not None else _asks_no_channels(node)
        if node.op == "call_method":
            return node.target in ("dim", "ndimension")
        if node.target is not builtins.getattr:
            return False
        return str(node.args[1]) in _OF_ANY_STREAM or (str(node.args[1]) == "shape" and _asks_no_channels(node))

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        is_number = step.node.op == "call_method" and not (step.node.target == "size" and len(step.given) == 1)
        return Flow(Layout(1, is_point=True) if is_number else Layout())

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        return None

    def rewrite(self, step: Step, graph: StreamGraph) -> None:
        source = step.operand
        if source in graph.streams:
            step.node.replace_input_with(source, graph.streams[source].high)


def _asks_no_channels(node: fx.Node) -> bool:
    """Whether every step that reads a shape takes only the batch size, the height or the width from it."""
    return all(user.target is operator.getitem and _is_of_others(user.args[1]) for user in node.users)


def _is_of_others(index: Any) -> bool:
    return any(bool(index == other) for other in (slice(2, None), slice(-2, None), *_NOT_CHANNELS))
