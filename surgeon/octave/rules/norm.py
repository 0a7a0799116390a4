"""Batch norms, of whatever class."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from surgeon.analysis import own_norms
from surgeon.analysis.obstacles import custom_call
from surgeon.blocks import norms
from surgeon.blocks.pairs import pair_kind
from surgeon.octave.layout import Flow, Layout, Layouts, Step
from surgeon.octave.rules import elementwise
from surgeon.octave.rules.base import StreamRule, WholeMap, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes


class Norm(StreamRule):
    """norm(join(h, l)) = join(norm[high] h, norm[low] l), and what its class runs behind it runs on each stream."""

    name = "norm"
    is_channelwise = True

    def matches(self, step: Step) -> bool:
        return step.module is not None and _can_be_cut(step.module) and _needing_all(step.module) is None

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        assert step.module is not None
        return Flow(replace(step.layout_before(layouts), channels=_channels(step.module)))

    def obstacle(self, step: Step, flow: Flow, graph: StreamGraph) -> str | None:
        if why := super().obstacle(step, flow, graph):
            return why
        low = flow.layout.low
        is_taken = graph.norms.get(str(step.node.target), low) != low  # elsewhere it is called with other low channels
        return f"{step.said} needs the whole map" if is_taken else None

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        assert step.operand is not None
        pair, name = graph.streams[step.operand], str(step.node.target)
        graph.norms[name] = graph.layouts[step.node].low
        return graph.parts(graph.graph.call_module(name, ((pair.high, pair.low),)))


class NormWithMore(WholeMap):
    """f(norm(join(h, l))): what the class of a norm runs behind it, and is no step on each number alone."""

    name = "norm with more"

    def matches(self, step: Step) -> bool:
        return step.module is not None and _can_be_cut(step.module) and _needing_all(step.module) is not None

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        assert step.module is not None
        flow = whole_map(step, layouts, Layout(_channels(step.module)))
        said = f"{step.node.target} runs its {_needing_all(step.module)}, which needs the whole map"
        return replace(flow, seam=flow.seam and said)


def _can_be_cut(norm: nn.Module) -> bool:
    """Whether a module is a norm that computes each channel alone, in train mode too."""
    if not norms.is_batch_norm(norm):
        return False
    is_tried = norms.is_frozen(norm) and own_norms.is_frozen_alike(norm)
    return pair_kind(norm, is_tried=is_tried) is not None


def _needing_all(norm: nn.Module) -> str | None:
    """Name what runs behind a norm and is no step on each number alone."""
    for name in norms.rest_of(norm):
        module = norm.get_submodule(name)
        if not elementwise.is_elementwise(module) or custom_call(module, "it"):
            return f"{name} ({type(module).__name__})"
    return None


def _channels(norm: nn.Module) -> int:
    weight = norm.running_var if norms.is_frozen(norm) else None
    return len(weight) if isinstance(weight, Tensor) else int(norm.num_features)  # type: ignore[arg-type]
