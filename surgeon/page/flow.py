"""How two streams go through the graph of an island, as plain data that can be drawn.

The graph of an island holds the steps on each stream one by one. Here the two steps that do the same on the high and on
the low stream are one, and what follows a conv number by number, such as its norm and its activation, belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from surgeon.analysis.rewritten import graph_of
from surgeon.blocks.two_streams import TwoStreams
from surgeon.conv import streams
from surgeon.models.copies import kind_of

Kind = Literal["input", "octave", "conv", "sum", "cat", "pool", "join", "split", "other", "more", "output"]
_FEW = 2  # steps of one stream that are drawn one by one where they follow each other


@dataclass(slots=True)
class FlowStep:
    """One step that is drawn: what it is, which steps it reads, and the channels of both streams behind it."""

    name: str  # the path of the module, or what the function is called
    kind: Kind
    label: str = ""  # what it does
    reads: tuple[int, ...] = ()  # places of earlier steps
    high: int | None = None  # channels; None where it is not known
    low: int = 0  # channels of the low stream; 0 where there is none
    then: tuple[str, ...] = ()  # what follows it number by number
    paths: tuple[str, ...] = ()  # of the convs that it stands for


@dataclass(frozen=True, slots=True)
class Flow:
    """An island whose graph two streams go through: its path, and its steps in order."""

    island: str
    steps: tuple[FlowStep, ...]


def flows_in(model: nn.Module) -> tuple[Flow, ...]:
    """Follow two streams through all islands of a model that were rewritten for them."""
    found = []
    for path, module in model.named_modules():
        graph = graph_of(module)
        if graph is None or not any(isinstance(one, TwoStreams) for one in module.modules()):
            continue
        steps = _Reader(dict(module.named_modules(remove_duplicate=False))).read(graph)
        found.append(Flow(path, tuple(_shortened(steps))))
    return tuple(found)


_SUMS = {"add", "iadd", "add_", "sub", "isub", "add_into"}
_POOLS = {"max_pool2d", "avg_pool2d", "interpolate", "adaptive_avg_pool2d", "adaptive_max_pool2d", "pool", "up"}
_ALONE = {"relu", "relu_", "relu6", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh"}
_ALONE |= {"leaky_relu", "elu", "dropout", "clone", "contiguous", "float", "to", "mish", "softplus", "low_pass"}


@dataclass(slots=True)
class _Reader:
    """Reads the nodes of a graph one after the other; `at` says which step a node belongs to, and to which stream."""

    modules: dict[str, nn.Module]
    steps: list[FlowStep] = field(default_factory=list)
    at: dict[fx.Node, tuple[int, int | None]] = field(default_factory=dict)
    twins: dict[tuple[Any, ...], int] = field(default_factory=dict)  # steps on the high stream that wait for the low

    def read(self, graph: fx.Graph) -> list[FlowStep]:
        for node in graph.nodes:
            self._take(node)
        return self.steps

    def _take(self, node: fx.Node) -> None:
        sources = [self.at[one] for one in node.all_input_nodes if one in self.at]
        reads = tuple(dict.fromkeys(place for place, _ in sources))
        lanes = {lane for _, lane in sources} - {None}  # a plain map may be an operand on either stream
        lane = lanes.pop() if len(lanes) == 1 else None
        if node.op == "placeholder":
            self._add(node, FlowStep(str(node.target), "input"))
        elif node.op == "output":
            self._add(node, FlowStep("output", "output", reads=reads))
        elif not sources:  # attributes and constants
            return
        elif _name_of(node) == "getitem" and self._is_pair(node):
            self.at[node] = (reads[0], int(str(node.args[1])))
        elif self._is_alone(node) and len(reads) == 1:
            self._attach(node, reads[0], lane)
        else:
            self._step(node, reads, lane, tuple(dict.fromkeys(place for place, own in sources if own is not None)))

    def _is_pair(self, node: fx.Node) -> bool:
        """Whether a step takes one of two streams out of a pair."""
        place, lane = self.at[node.all_input_nodes[0]]
        step = self.steps[place]
        return lane is None and (step.low > 0 or step.kind == "octave") and node.args[1] in (0, 1)

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether a step treats every number, or every channel, alone."""
        if node.op != "call_module":
            return _name_of(node) in _ALONE
        module = self.modules[str(node.target)]
        is_small = not list(module.children()) and all(one.dim() < 2 for one in module.parameters())
        shrinks = "pool" in kind_of(module).__name__.lower() or isinstance(module, nn.Flatten | nn.Upsample)
        return is_small and not shrinks and not isinstance(module, TwoStreams)

    def _attach(self, node: fx.Node, place: int, lane: int | None) -> None:
        """Let a step belong to the one that it follows."""
        self.at[node] = (place, lane)
        said = _name_of(node) if node.op != "call_module" else kind_of(self.modules[str(node.target)]).__name__
        step = self.steps[place]
        if lane != 1 or not step.then or step.then[-1] != said:
            step.then += (said,)

    def _step(self, node: fx.Node, reads: tuple[int, ...], lane: int | None, halves: tuple[int, ...]) -> None:
        """Take a step; the one on the low stream is told by the `halves` of pairs that it reads."""
        key = (node.op, node.target, halves)
        if lane == 1 and key in self.twins:
            self.at[node] = (self.twins.pop(key), 1)
            return
        step = self._described(node, reads)
        place = self._add(node, step)
        if lane == 0:
            self.twins[key] = place
            low = [self.steps[one].low for one in halves]
            step.low = sum(low) if step.kind == "cat" else max(low)
        self.at[node] = (place, lane)

    def _described(self, node: fx.Node, reads: tuple[int, ...]) -> FlowStep:
        """Say what a step is, and how many channels both streams have behind it."""
        high = next((self.steps[one].high for one in reads if self.steps[one].high is not None), None)
        if node.op == "call_module":
            return self._module(str(node.target), self.modules[str(node.target)], reads, high)
        name = _name_of(node)
        if node.target is streams.split:
            ranges: Any = node.args[1]
            low = sum(stop - start for start, stop in ranges)
            return FlowStep("split", "split", reads=reads, high=None if high is None else high - low, low=low)
        if node.target in (streams.join, streams.interleave):
            low = self.steps[reads[0]].low
            return FlowStep("join", "join", reads=reads, high=None if high is None else high + low)
        if name in _SUMS:
            return FlowStep("sum", "sum", "+", reads, high)
        if name in ("cat", "concat", "concatenate"):
            known = [self.steps[one].high for one in reads]
            high = None if None in known else sum(one for one in known if one is not None)
            return FlowStep("cat", "cat", "side by side", reads, high)
        kind: Kind = "pool" if name in _POOLS else "other"
        return FlowStep(name, kind, name, reads, high if kind == "pool" else None)

    def _module(self, path: str, module: nn.Module, reads: tuple[int, ...], high: int | None) -> FlowStep:
        name = kind_of(module).__name__
        if isinstance(module, TwoStreams):
            low = sum(stop - start for start, stop in module.low_out)
            words = f"{'×'.join(map(str, module.spec.kernel))}"
            words += f", stride {module.spec.stride[0]}" if max(module.spec.stride) > 1 else ""
            return FlowStep(path, "octave", words, reads, module.spec.c_out - low, low, paths=(path,))
        if isinstance(module, nn.Conv2d):
            words = f"{'×'.join(map(str, module.kernel_size))}"
            words += f", stride {module.stride[0]}" if max(module.stride) > 1 else ""
            return FlowStep(path, "conv", words, reads, module.out_channels, paths=(path,))
        kind: Kind = "pool" if "pool" in name.lower() else "other"
        return FlowStep(path, kind, name, reads, high if kind == "pool" else None)

    def _add(self, node: fx.Node, step: FlowStep) -> int:
        self.steps.append(step)
        self.at[node] = (len(self.steps) - 1, None)
        return len(self.steps) - 1


def _name_of(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def _shortened(steps: list[FlowStep]) -> Iterator[FlowStep]:
    """Put steps of one stream that follow each other into one, where they are many."""
    groups: list[list[int]] = []
    for place, step in enumerate(steps):
        if groups and _is_plain(step) and _is_plain(steps[groups[-1][-1]]):
            groups[-1].append(place)
        else:
            groups.append([place])
    parts = [part for group in groups for part in ([group] if len(group) > _FEW else [[one] for one in group])]
    moved = {place: new for new, part in enumerate(parts) for place in part}
    for new, part in enumerate(parts):
        reads = dict.fromkeys(moved[one] for place in part for one in steps[place].reads)
        last = steps[part[-1]]
        if len(part) == 1:
            last.reads = tuple(reads)
            yield last
            continue
        paths = tuple(path for place in part for path in steps[place].paths)
        yield FlowStep(
            f"{len(part)} steps in one stream",
            "more",
            f"{paths[0]} … {paths[-1]}" if len(paths) > 1 else ", ".join(paths),
            tuple(one for one in reads if one != new),
            last.high,
            paths=paths,
        )


def _is_plain(step: FlowStep) -> bool:
    return step.kind not in ("octave", "join", "split", "input", "output") and not step.low
