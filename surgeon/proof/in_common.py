"""Which tensors two models have in common, and by how much the others may have been moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import TorchDispatchMode, pytree
from surgeon.blocks.base import without_roles
from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.devices import dtype_of
from surgeon.proof.calls import call
from surgeon.proof.distance import rounded_to
from surgeon.proof.isolated import FEW_UNITS
from surgeon.proof.ulps import off

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def units(a: nn.Module, b: nn.Module) -> float:
    """By how many units the numbers of B may be moved: none if both hold the same, one, or a few."""
    kinds = [[type(module) for module in model.modules()] for model in (a, b)]
    if kinds[0] != kinds[1] or isinstance(a, Compiled):
        return FEW_UNITS
    ours, theirs = b.state_dict(), a.state_dict()
    keys = [key for key in theirs if not key.endswith("num_batches_tracked")]
    pairs = [(ours.get(key), theirs[key]) for key in keys if isinstance(theirs[key], torch.Tensor)]
    is_equal = all(one is not None and off(one, two, {two.dtype}).ulps == 0 for one, two in pairs)
    return 0.0 if is_equal else 1.0


def with_tensors_of(b: nn.Module, replay: nn.Module) -> nn.Module | None:
    """Copy the replay's modules and give them B's tensors; None if they do not fit, which another check reports."""
    dtype = dtype_of(b)
    in_own = None if dtype == torch.float64 else rounded_to(dtype)
    twin = shadow(replay, in_own)
    try:
        twin.load_state_dict(without_roles(b.state_dict()), assign=True)
    except RuntimeError:
        return None
    return twin


def still(a: nn.Module, b: nn.Module) -> dict[int, Tensor]:
    """Say of tensors that both hold under one name which numbers are equal, by address: nothing has rounded these."""
    ours, theirs = _by_name(a), _by_name(b)
    pairs = [(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    alike = [(x, y) for x, y in pairs if x.numel() and x.dtype == y.dtype and x.shape == y.shape]
    return {one.data_ptr(): x == y for x, y in alike for one in (x, y)}


def narrows(a: nn.Module, b: nn.Module, inputs: Inputs, seed: int) -> bool:
    """Whether code of the model that is no file computes in a smaller dtype, though all it was given is float64."""
    code = [model for model in (a, b) if not isinstance(model, Compiled)]
    watch = _Narrowed()  # type: ignore[no-untyped-call]
    for model in code:
        with watch:
            call(model, inputs, torch.float64, seed)
    return watch.seen


def refusal(a: nn.Module, b: nn.Module, inputs: Inputs) -> str | None:
    """Say why an input is none that a file declares that it takes, if A or B is one."""
    files = [model for model in (a, b) if isinstance(model, Compiled)]
    return next((why for one in files if (why := one.refusal(inputs.args, inputs.kwargs)) is not None), None)


class _Narrowed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether any step gives numbers in a smaller dtype than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= any(isinstance(one, Tensor) and one.dtype in _NARROW for one in pytree.tree_leaves(out))
        return out


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Compiled):
        return model.stored
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
