"""Steps that treat every number by itself."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

from surgeon.octave.layout import Flow, Layouts, Step, broadcast
from surgeon.octave.rules.base import StreamRule, whole_map
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

MODULES = {
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
}
FUNCTIONS = {
    *(F.relu, F.relu6, F.relu_, F.leaky_relu, F.leaky_relu_, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid),
    *(F.threshold, F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.exp, torch.neg, torch.square),
    operator.neg,
}
METHODS = {
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "abs", "exp", "neg", "square", "contiguous"),
    *("clone", "detach"),
}
# What timm's norms run behind them; elsewhere tracing goes into such a module.
_TIMMS = {
    *(f"activations.{name}" for name in ("Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "HardMish")),
    *(f"activations.{name}" for name in ("GELU", "GELUTanh", "QuickGELU", "PReLU")),
    *(f"activations_me.{name}Me" for name in ("Swish", "Mish", "HardSigmoid", "HardSwish", "HardMish")),
}
TIMMS = {f"{home}.{name}" for home in ("timm.layers", "timm.models.layers") for name in _TIMMS}


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module treats every number by itself, and all in the same way."""
    kind = type(module)
    known = kind in MODULES or kind is nn.PReLU or f"{kind.__module__}.{kind.__qualname__}" in TIMMS
    return known and (not isinstance(module, nn.PReLU) or module.num_parameters == 1)


class Elementwise(StreamRule):
    """f(join(h, l)) = join(f(h), f(l)), because f gives the same result for each copy of a pixel that up makes."""

    name = "elementwise"
    is_channelwise = True

    def matches(self, step: Step) -> bool:
        is_known = step.module is not None and is_elementwise(step.module)
        return is_known or step.calls((), FUNCTIONS, METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Let a map through; a bound may be a number for all of it or for each channel, not a map of its own."""
        source = step.operand
        if source is None or any(layouts[value].low for value in step.others):
            return whole_map(step, layouts)
        if all(layouts[value].scales(layouts[source]) for value in step.others):
            return Flow(layouts[source])
        joined = broadcast(layouts[value].plain for value in step.node.all_input_nodes)
        return whole_map(step, layouts, joined)

    def rewrite(self, step: Step, graph: StreamGraph) -> StreamNodes:
        source = step.operand
        assert source is not None
        pair = graph.own(graph.streams[source], step)
        parts = {value: graph.parted(value, graph.layouts[source]) for value in step.others}
        highs, lows = ({value: part[i] for value, part in parts.items()} for i in (0, 1))
        return StreamNodes(graph.again(step, {source: pair.high} | highs), graph.again(step, {source: pair.low} | lows))
