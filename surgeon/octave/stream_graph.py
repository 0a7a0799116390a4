"""The graph of an island while two streams are led through it: which of its values exist as streams, and the edits that
rules make.

    split(join(h, l)) = (h, l)

A step that two streams can go through is replaced by steps on each; one that cannot gets the joined map.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from surgeon.analysis.islands import Island
from surgeon.analysis.trace import FOLLOWS_MODE
from surgeon.conv import streams
from surgeon.conv.streams import Ranges
from surgeon.octave.layout import Layout, Step

# Functions and methods that may give a view of what they are given.
_VIEWS = frozenset(
    {"getitem", "chunk", "split", "narrow", "unbind", "view", "view_as", "reshape", "flatten", "unflatten", "expand"}
    | {"expand_as", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "t", "detach", "contiguous", "to"}
    | {"float", "double", "half", "type_as", "unfold"}
)


@dataclass(frozen=True, slots=True)
class Seam:
    """A place in an island where two streams are joined, or one map is split, and why it has to be."""

    island: str
    kind: Literal["join", "split", "local"]  # local: the island was left as it was
    reason: str


@dataclass(frozen=True, slots=True)
class StreamNodes:
    """The nodes of the two streams of a value; `is_view`: the high one is a view of another tensor."""

    high: fx.Node
    low: fx.Node
    is_view: bool = False


class StreamGraph:
    """A copy of the graph of one island; `streams` maps a replaced node to its two streams."""

    def __init__(self, root: nn.Module, island: Island) -> None:
        self.path = island.path
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.graph = fx.Graph()
        output = self.graph.graph_copy(island.graph, {})
        self.graph.output(output)
        self.layouts: dict[fx.Node, Layout] = {}
        self.streams: dict[fx.Node, StreamNodes] = {}
        self.norms: dict[str, Ranges] = {}  # norms that have to take two streams, and their low channels
        self.seams: list[Seam] = []
        self.fired: Counter[str] = Counter()  # how often each rule was used
        self.has_gained = False  # whether streams went through a step, or from one conv to the next
        self._joined: dict[fx.Node, fx.Node] = {}
        self._done: list[fx.Node] = []  # nodes that others have replaced
        self._follow_modes_()

    def step(self, node: fx.Node) -> Step:
        return Step(node, self.modules)

    def whole(self, node: fx.Node, reason: str) -> fx.Node:
        """Give the plain map of a value."""
        if node not in self.streams:
            return node
        if node not in self._joined:
            pair, layout = self.streams[node], self.layouts[node]
            function = streams.interleave if layout.is_fine else streams.join
            self._joined[node] = self.call(function, pair.high, pair.low, listed(layout.low))
            self.layouts[self._joined[node]] = layout.plain
            if layout.is_octave:
                self.seams.append(Seam(self.path, "join", reason))
        return self._joined[node]

    def split(self, node: fx.Node, low: Ranges, reason: str | None) -> StreamNodes:
        """Give the two streams of a value; a plain map is split."""
        layout = self.layouts[node]
        if node in self.streams and layout.low == low:
            pair = self.streams[node]
            self.fired["split(join)"] += 1
            self.has_gained = True
            return StreamNodes(pair.high, self.call(streams.pool, pair.low)) if layout.is_fine else pair
        whole = self.whole(node, reason or "other channels are low")
        both = self.call(streams.split, whole, listed(low))
        if reason is not None:
            self.seams.append(Seam(self.path, "split", reason))
        return self.parts(both, is_view=True)

    def parted(self, value: fx.Node, layout: Layout) -> tuple[fx.Node, fx.Node]:
        """Give what the high and the low channels of a map get of a number, or of one number for every channel."""
        whole = self.whole(value, "a step needs all its channels")
        if self.layouts[value].channels == 1:
            return whole, whole
        rest = streams.others(layout.low, layout.channels or 0)
        return self.call(streams.take, whole, listed(rest), -3), self.call(streams.take, whole, listed(layout.low), -3)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def parts(self, both: fx.Node, *, is_view: bool = False) -> StreamNodes:
        """Take the streams out of a pair."""
        high, low = (self.call(operator.getitem, both, i) for i in (0, 1))
        return StreamNodes(high, low, is_view)

    def again(self, step: Step, inputs: dict[fx.Node, fx.Node]) -> fx.Node:
        """Repeat a step on other inputs."""
        return self.graph.node_copy(step.node, lambda node: inputs.get(node, node))

    def own(self, pair: StreamNodes, step: Step) -> StreamNodes:
        """Make sure that a step that works in place changes no tensor that others read."""
        if not (pair.is_view and step.is_in_place):
            return pair
        return StreamNodes(self.graph.call_method("clone", (pair.high,)), self.graph.call_method("clone", (pair.low,)))

    def renew_(self, node: fx.Node, made: StreamNodes) -> None:
        """Let steps that read a value later see that a step has changed it in place."""
        if node in self.streams:
            self.streams[node] = made
            self._joined.pop(node, None)

    def replace_(self, node: fx.Node, made: StreamNodes | fx.Node) -> None:
        """Replace a value by two streams, or by another plain map."""
        if isinstance(made, StreamNodes):
            self.streams[node] = made
        else:
            self.layouts[made] = self.layouts[node]
            node.replace_all_uses_with(made)
        self._done.append(node)

    def take_whole_(self, step: Step, reason: str) -> None:
        """Leave a step as it is: what it reads is joined before it."""
        for source in step.node.all_input_nodes:
            if source in self.streams:
                with self.graph.inserting_before(step.node):
                    whole = self.whole(source, reason)
                step.node.replace_input_with(source, whole)
                if step.is_in_place or self._is_changed_through(step.node):  # steps that read it later have to see that
                    del self.streams[source]
                    source.replace_all_uses_with(whole)
                    self.layouts[whole] = self.layouts[source].plain

    def _is_changed_through(self, node: fx.Node) -> bool:
        """Whether the result of a step is a view of its input, and it or a view of it is changed in place."""
        if str(getattr(node.target, "__name__", node.target)) not in _VIEWS:
            return False
        return any(self.step(user).is_in_place or self._is_changed_through(user) for user in node.users)

    def erase_replaced_(self) -> None:
        for node in reversed(self._done):
            self.graph.erase_node(node)
        self._done.clear()

    def _follow_modes_(self) -> None:
        """Let functional dropouts read the mode of the module, which tracing has turned into a constant."""
        for node in list(self.graph.nodes):
            if node.meta.get(FOLLOWS_MODE):
                with self.graph.inserting_before(node):
                    mode = self.graph.create_node("get_attr", "training")
                node.update_kwarg("training", mode)


def listed(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Write ranges as a graph stores them."""
    return [list(limits) for limits in ranges]
