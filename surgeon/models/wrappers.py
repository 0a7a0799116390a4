"""The wrappers that a network may be in, and the check that a network can be edited."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from torch import fx, nn

from surgeon._torch_compat import OpOverload
from surgeon.errors import ModelError
from surgeon.models import devices
from surgeon.models.copies import Model

# Where wrappers of torch keep the model. All but DataParallel, which copies the model anew at every call, hold on to
# its parameters or to its code, so that it must be edited before it is wrapped.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def inner_of(module: nn.Module) -> str | None:
    """Name the attribute in which a wrapper of torch keeps the model; None where the module is no such wrapper."""
    inner = WRAPPERS.get(type(module).__name__)
    return inner if inner in dict(module.named_children()) else None


def checked(model: Model) -> Model:
    """Make sure, before anything is done with it, that a model is one, and that it can be edited.

    Raises:
        ModelError: what stands in the way, and what to give instead.
    """
    if isinstance(model, nn.Module):
        if (device := devices.of(model)) is not None and device.type in devices.NO_FLOAT64:
            raise ModelError(
                f"the model lies on {device}, which has no float64, and surgeon proves in float64",
                todo="Give it on the CPU, model.cpu(), and move the result.",
            )
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(
                    f"{name or 'the model'} is TorchScript, which has no modules that could be swapped, and no copy "
                    "that could be trained",
                    todo="Give the model that it was made from.",
                )
            if isinstance(module, fx.GraphModule) and any(isinstance(n.target, OpOverload) for n in module.graph.nodes):
                raise ModelError(
                    f"{name or 'the model'} is an exported graph, whose convs are not modules",
                    todo="Give the network that was exported.",
                )
            if (inner := _kept_to(module)) is not None:
                path = ".".join(part for part in ("model", name, inner) if part)
                raise ModelError(
                    f"{name or 'the model'} is wrapped in {type(module).__name__}, which keeps the model as it was",
                    todo=f"Give {path}, and wrap the result.",
                )
        return model
    raise not_a_model(model)


def not_a_model(given: object) -> ModelError:
    """Say that something is not a model, and how to get one from it."""
    kind, todo = type(given).__name__, "Give an nn.Module."
    if isinstance(given, str | PathLike):
        todo = f"surgeon.load({given!r}) opens a file."
    elif isinstance(given, Mapping):
        todo = "If it holds weights, build the network and load_state_dict first, and give the network."
    elif isinstance(given, type) and issubclass(given, nn.Module):
        return ModelError(f"{given.__name__} is a class, not a model", todo=f"Build it: {given.__name__}(…).")
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    return ModelError(f"{article} {kind} is not a model", todo=todo)


def _kept_to(module: nn.Module) -> str | None:
    """Name where a wrapper keeps a model that it holds on to."""
    is_torchs = type(module).__module__.startswith("torch.")
    return inner_of(module) if is_torchs and not isinstance(module, nn.DataParallel) else None
