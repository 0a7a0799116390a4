"""The contract of a rule: what one kind of step does to two streams.

Every octave conv begins as join ∘ core ∘ split. A rule moves the joins down through one kind of step, until they meet a
split, which undoes them. Its docstring is its equation. In eval mode it is exact bit by bit: every number is
computed as before.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import fx

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class StreamRule(abc.ABC):
    """One kind of step. Planning asks for `flow`; `rewrite` changes the graph."""

    name: ClassVar[str]  # under which it is counted
    carries: ClassVar[bool] = True  # whether the streams that go in also come out
    is_channelwise: ClassVar[bool] = False  # whether each output channel depends on the same input channel only

    @abc.abstractmethod
    def matches(self, step: Step) -> bool:
        """Whether this is the rule of the step; no two rules may match the same step."""

    @abc.abstractmethod
    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Give the layout after a step, from the layouts before it."""

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        """Say why the streams cannot go through this step of a graph."""
        return None if flow.layout.low else flow.seam or step.need

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes | fx.Node | None:
        """Insert steps on two streams before a step without obstacle: they give two streams again, or one map.

        None means that the step stays as it is now.
        """
        raise NotImplementedError(f"no streams come out of the rule {self.name}")


class WholeMap(StreamRule):
    """f(join(h, l)): a step that no rule matches needs the whole map."""

    name = "other"
    carries = False

    def matches(self, step: Step) -> bool:
        return True

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        return whole_map(step, layouts)


def whole_map(step: Step, layouts: Layouts, layout: Layout | None = None) -> Flow:
    """Give the result of a step that needs the whole map."""
    has_streams = any(layouts[value].is_octave for value in step.node.all_input_nodes)
    return Flow(layout or Layout(), step.need if has_streams else None)
