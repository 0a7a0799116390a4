"""A linear sub-graph as one layer, and the proof that it is that: both are run in float64 on maps with all borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.analysis.linear import SubGraph
from surgeon.analysis.linear_steps import Steps
from surgeon.blocks import norms
from surgeon.errors import PassError
from surgeon.models.copies import shadow
from surgeon.proof.distance import EXACT, as_double

Layer = nn.Conv2d | nn.Linear


def built(found: SubGraph, bias: Tensor | None, like: Tensor) -> Layer:
    """Make the conv or linear layer that a sub-graph is, cast once to the dtype of `like`.

    Raises:
        PlanError: the dtype does not hold one of its numbers.
    """
    conv = found.affine.spec().build_with(found.affine.kernel, bias, like=like)
    if found.space == "map":
        return conv
    layer = nn.Linear(conv.in_channels, conv.out_channels, bias is not None, device="meta", dtype=like.dtype)
    layer.weight = nn.Parameter(conv.weight[:, :, 0, 0].detach())
    layer.register_parameter("bias", None if conv.bias is None else nn.Parameter(conv.bias.detach()))
    return layer


def is_proved(steps: Steps, found: SubGraph, where: str) -> bool:
    """Compare a sub-graph with its layer in float64, on inputs of several sizes; whether one of them runs.

    Raises:
        PassError: they differ.
    """
    whole = found.affine
    part, layer = _alone(steps, found), built(found, whole.bias, whole.kernel)
    generator = torch.Generator().manual_seed(0)
    ran = False
    for shape in _shapes(found):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(whole.kernel.device)
        try:
            expected = part(x)
        except (RuntimeError, ValueError):  # an odd map, say, where only even ones fit
            continue
        apart = float((layer(x) - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
        if not apart <= EXACT:
            raise PassError(
                "fuse", f"what was folded in {where}, up to {found.sink.name}, is {apart:.1e} from what it was"
            )
        ran = True
    return ran


def needed(found: SubGraph) -> set[fx.Node]:
    """The steps of a sub-graph, and those that compute its constants."""
    nodes, waiting = set(found.nodes), list(found.nodes)
    while waiting:
        for one in waiting.pop().all_input_nodes:
            if one is not found.source and one not in nodes:
                nodes.add(one)
                waiting.append(one)
    return nodes


def _alone(steps: Steps, found: SubGraph) -> fx.GraphModule:
    """Give a sub-graph as a module of its own, in float64 and eval mode."""
    graph, held = fx.Graph(), nn.Module()
    made = {found.source: graph.placeholder("x")}
    for i, node in enumerate(sorted(needed(found), key=steps.order.__getitem__)):
        made[node], name = graph.node_copy(node, made.__getitem__), f"at_{i}"
        if (module := steps.module(node)) is not None:
            leaves = found.leaves and node is found.sink
            held.add_module(name, shadow(norms.core_of(module) if leaves else module, as_double).eval())
            made[node].target = name
        elif node.op == "get_attr":
            held.register_buffer(name, _attribute(steps.root, str(node.target)).detach().double())
            made[node].target = name
    graph.output(made[found.sink])
    return fx.GraphModule(held, graph)


def _shapes(found: SubGraph) -> list[tuple[int, ...]]:
    """Shapes of inputs on which it is tried: maps whose borders are all there, or vectors and lists of them."""
    channels = found.affine.c_in
    if found.space == "vector":
        most = max(step.channels or 0 for step in found.steps.values())
        return [(5, channels), (2, most + 1, channels)]  # no norm may take the second axis for channels
    reach = max(axis.dilation * (axis.kernel - 1) + axis.stride for axis in found.affine.axes)
    return [(2, channels, 2 * reach + 4, 2 * reach + 8), (2, channels, 2 * reach + 5, 2 * reach + 3)]


def _attribute(module: nn.Module, path: str) -> Any:
    holder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(holder), name)
