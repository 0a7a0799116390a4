"""The shapes of what the steps of an island give, in one run of the network.

A graph does not say them, and a rewriting that has to know whether two maps have the same channels asks for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon._torch_compat import pytree
from surgeon.analysis.islands import Island
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, to_meta
from surgeon.models.sandbox import quietly

Shapes = Mapping[str, tuple[int, ...]]  # by the names of steps


def shapes_in(model: nn.Module, inputs: Inputs, islands: Sequence[Island]) -> dict[str, Shapes]:
    """Give the shape of every tensor in every island, by the island's path.

    The run is made on the meta device, which computes nothing; if the model needs real values, it is made with them.
    Nothing is known of an island that the run does not reach, nor of a step whose shape differs from call to call.
    """
    try:
        return _noted(shadow(model, to_meta).requires_grad_(False), inputs.on_meta(), islands)
    except Exception:
        return _noted(shadow(model), inputs, islands)


def _noted(model: nn.Module, inputs: Inputs, islands: Sequence[Island]) -> dict[str, Shapes]:
    found: dict[str, dict[str, tuple[int, ...] | None]] = {island.path: {} for island in islands}

    def hook(island: Island) -> Any:
        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = pytree.tree_map_only(Tensor, torch.clone, _arguments(module, island.graph, args, kwargs))
            _Noting(module, island.graph, found[island.path]).run(*given)

        return noted

    for island in islands:
        model.get_submodule(island.path).register_forward_pre_hook(hook(island), with_kwargs=True)
    given = inputs.cast_for(model)
    with quietly(), torch.no_grad():
        given.call(in_mode(model, False))
    return {path: {name: shape for name, shape in one.items() if shape is not None} for path, one in found.items()}


class _Noting(fx.Interpreter):
    """Runs a graph and notes the shape of what each step gives."""

    def __init__(self, module: nn.Module, graph: fx.Graph, shapes: dict[str, tuple[int, ...] | None]) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            shape = tuple(made.shape)
            self.shapes[n.name] = shape if self.shapes.get(n.name, shape) == shape else None
        return made


def _arguments(module: nn.Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Give the inputs of a graph in their order."""
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    named = dict(zip(names, args, strict=False)) | kwargs
    defaults = {name: one.default for name, one in inspect.signature(module.forward).parameters.items()}
    return [named[name] if name in named else defaults[name] for name in names]
