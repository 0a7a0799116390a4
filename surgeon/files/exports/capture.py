"""A network and one call of it → a program of torch's (`torch.export`), in eval mode, on the CPU.

The batch varies if the network lets it, and with `dynamic_size` height and width do, too. torch takes a side of 1 for
a constant, so a batch of one image is exported as two.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

from surgeon._torch_compat import pytree
from surgeon.errors import CaptureError
from surgeon.files.exports.base import SIDES, Captured
from surgeon.files.exports.compiled import is_record, opened
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.sandbox import quietly

_IS_NAME = re.compile(r"\W+")


def capture(model: nn.Module, inputs: Inputs, *, dynamic_size: bool = False) -> Captured:
    """Export a network; `notes` of the result say why its batch has to stay as it is, if it does.

    Raises:
        CaptureError: torch cannot export it, or not with the sizes that vary.
    """
    own = in_mode(shadow(devices.on(model, devices.CPU)), False).requires_grad_(False)
    given = inputs.cast_for(own)
    with quietly(0):
        out = given.call(shadow(own))
    own = _opening_records(own, out)
    outputs = _output_names(out)
    error: Exception | None = None
    if given.batch and any(t.dim() for t in given.tensors):
        try:
            return _captured(own, given if given.batch > 1 else given.batched(2), outputs, True, dynamic_size)
        except Exception as one:  # whatever torch says; a batch that does not vary is tried next
            error = one
    try:
        captured = _captured(own, given, outputs, False, dynamic_size)
    except Exception as again:
        raise _refusal(own, given, again, dynamic_size=dynamic_size) from again
    note = f"the batch stays {given.batch}, since the network takes no other: {_first(error)}"
    return captured if error is None else dataclasses.replace(captured, notes=(note,))


def _captured(model: nn.Module, inputs: Inputs, outputs: tuple[str, ...], batch: bool, size: bool) -> Captured:
    shapes, varies = ShapesCollection(), {}  # type: ignore[no-untyped-call]
    for tensor in inputs.tensors:
        is_batch = batch and tensor.dim() > 0 and len(tensor) == inputs.batch
        first = 2 if tensor.dim() > 3 or is_batch else 1
        axes = [0] * is_batch + (list(range(first, tensor.dim())) if size and tensor.dim() > 2 else [])
        varies[id(tensor)] = axes
        if axes:
            shapes[tensor] = dict.fromkeys(axes, Dim.DYNAMIC)
    with quietly(0):
        program = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes)
    return Captured(program, outputs, dict(_sides(program, inputs, varies)))


def _sides(program: Any, inputs: Inputs, varies: dict[int, list[int]]) -> Iterator[tuple[str, str]]:
    """Name the symbols of sides that vary: batch, height, width; of further inputs, with their names before."""
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    held = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    seen: dict[str, str] = {}
    for node, tensor in zip(held, inputs.tensors, strict=False):
        for axis in varies[id(tensor)]:
            symbol = str(node.meta["val"].shape[axis])
            name = SIDES[0] if axis == 0 else SIDES[min(axis - tensor.dim() + 2, 1) + 1]
            free = name if name not in seen.values() else f"{node.name}_{name}"
            seen.setdefault(symbol, free)
    yield from seen.items()


def _output_names(out: Any) -> tuple[str, ...]:
    """Name outputs after the keys of dicts and the fields of records; others are output, or output_0, output_1 …"""
    leaves, _ = pytree.tree_flatten_with_path(opened(out))
    found: list[str] = []
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        name = _IS_NAME.sub("_", "_".join(parts)).strip("_")
        name = f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name
        found.append(name if name not in found else f"{name}_{len(found)}")
    return tuple(found)


def _opening_records(model: nn.Module, out: Any) -> nn.Module:
    """Let a copy return dicts in place of records that torch cannot export."""
    leaves = pytree.tree_leaves(out, is_leaf=is_record)
    if any(is_record(leaf) for leaf in leaves):
        forward = model.forward

        @functools.wraps(forward)
        def in_dicts(*args: Any, **kwargs: Any) -> Any:
            return opened(forward(*args, **kwargs))

        vars(model)["forward"] = in_dicts
    return model


def _refusal(model: nn.Module, inputs: Inputs, error: Exception, *, dynamic_size: bool) -> CaptureError:
    if dynamic_size:
        try:
            _captured(model, inputs, (), False, False)
        except Exception:  # the size is not why
            pass
        else:
            return CaptureError(
                f"the network cannot be exported for images of any size: {_first(error)}",
                todo="Leave out --dynamic-size: then it is exported for the size of the example.",
            )
    return CaptureError(
        f"torch cannot export the network: {_first(error)}",
        todo="Write a .pt or .safetensors file; or change the forward so that torch.export follows it.",
    )


def _first(error: BaseException | None) -> str:
    return "" if error is None else where(error)
