"""The contract of a rule: what one kind of step does to two streams.

Every octave conv begins as join ∘ core ∘ split. A rule moves the joins down through one kind of step, until they meet a
split, which undoes them. Its docstring is its equation. In eval mode it is exact bit by bit: no number is computed
otherwise than before.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class StreamRule(abc.ABC):
    """One kind of step. `flow` is what planning asks, and `rewrite` is what the graph gets."""

    name: ClassVar[str]  # under which it is counted
    carries: ClassVar[bool] = True  # whether the streams that go in are those that come out
    is_channelwise: ClassVar[bool] = False  # whether each channel that comes out is made of the one that goes in

    @abc.abstractmethod
    def matches(self, step: Step) -> bool:
        """Whether it is the rule of this step; it is that of no step which another rule matches."""

    @abc.abstractmethod
    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Say how the channels lie behind a step, from how they lie before it."""

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        """Say why the streams cannot go through this step of a graph."""
        if flow.low_pass:
            return flow.seam or f"'{step.name}' adds a plain map"
        return None if flow.layout.low else flow.seam or f"'{step.name}' needs the whole map"

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes | None:
        """Put steps on two streams before a step without obstacle; None: this step, as it is now, stays."""
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
    """What comes out of a step that needs the whole map."""
    has_streams = any(layouts[value].is_octave for value in step.node.all_input_nodes)
    return Flow(layout or Layout(), f"'{step.name}' needs the whole map" if has_streams else None)
