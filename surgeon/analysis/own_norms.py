"""Norms with a forward of their own: whether a class that nobody has listed computes the batch norm of its statistics.

That is measured on a copy, in float64: in eval mode against γ/σ·(x − μ) + β, and in train mode, where the conv before
it has a bias, norm(x + b) against the norm of x whose running mean is smaller by b.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from surgeon._torch_compat import BatchNorm, NormBase
from surgeon.blocks import norms
from surgeon.conv import kernels
from surgeon.models.copies import in_mode, shadow
from surgeon.models.sandbox import quietly

_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_CLOSE = 1e-10
_SIZES = ((16, 3, 3), (2, 5, 4), (3, 1, 1))  # batch, height and width of the maps that it is tried on
_WORDS: dict[type[nn.Module], str] = {
    nn.GroupNorm: "which mixes channels",
    nn.LayerNorm: "which mixes channels",
    nn.RMSNorm: "which mixes channels",
    BatchNorm: "which has a forward of its own",
    NormBase: "which takes its statistics from each image",  # those that are no batch norm
}


def is_norm_class(kind: type[nn.Module]) -> bool:
    return issubclass(kind, tuple(_WORDS)) or "norm" in kind.__name__.lower()


def in_words(kind: type[nn.Module]) -> str:
    """Say in words why a norm of this class is no scale and shift of each channel, as far as its class tells."""
    return next((said for known, said in _WORDS.items() if issubclass(kind, known)), "which is no batch norm")


def norm_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, type[nn.Module]] | None:
    """The path and the class of the norm that a step calls, or that tracing has gone into; None if it is of none."""
    if node.op == "call_module":
        found = str(node.target), type(modules[str(node.target)])
    else:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack or not stack[-1][0]:
            return None
        found = stack[-1]
    return found if is_norm_class(found[1]) else None


def refusal(norm: nn.Module, *, has_bias: bool) -> str | None:
    """Say why a norm that holds what a batch norm does cannot be taken over, or None if it can be."""
    if norms.is_known(norm):
        return None
    if any(tensor.is_meta for tensor in norm.state_dict().values()):
        return "which has a forward of its own and no numbers to try it with"
    with quietly(seed=0):
        try:
            return _measured(norm, has_bias=has_bias)
        except Exception as error:  # it is the user's code
            return f"whose own forward cannot be tried by itself: {(str(error).splitlines() or [''])[0].rstrip('.')}"


def is_frozen_alike(norm: nn.Module) -> bool:
    """Whether a norm that holds buffers alone computes the batch norm of them, in train mode too."""
    if norms.is_known(norm):
        return True
    if norm not in _TRIED:
        with quietly(seed=0):
            try:
                _TRIED[norm] = not any(tensor.is_meta for tensor in norm.buffers()) and _is_the_same_in_training(norm)
            except Exception:  # it is the user's code
                _TRIED[norm] = False
    return _TRIED[norm]


def _is_the_same_in_training(norm: nn.Module) -> bool:
    if _measured(norm, has_bias=False) is not None:
        return False
    trained, x = in_mode(shadow(norm, _as_double), True), _map_like(norm, _SIZES[0])
    before = [tensor.clone() for tensor in trained.buffers()]
    is_same = _is_close(trained(x), _batch_norm(trained, x))
    return is_same and all(torch.equal(one, other) for one, other in zip(before, trained.buffers(), strict=True))


def _measured(norm: nn.Module, *, has_bias: bool) -> str | None:
    evaluated = in_mode(shadow(norm, _as_double), False)
    for size in (*_SIZES, *_SIZES):
        x = _map_like(norm, size)
        if not _is_close(evaluated(x), _batch_norm(evaluated, x)):
            return "whose own forward is not the batch norm of its statistics"
        _train_(evaluated)
    if has_bias and not _moves_with_its_input(norm):
        return "whose own forward in train mode depends on the bias of the conv before it"
    return None


def _train_(norm: nn.Module) -> None:
    """Give every tensor other numbers, as training may: those of either sign, but for the variance."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                numbers = torch.randn(tensor.shape, generator=draws, dtype=torch.float64).to(tensor.device)
                tensor.copy_(numbers.abs() + 0.5 if name == "running_var" else numbers)


def _moves_with_its_input(norm: nn.Module) -> bool:
    """Whether adding b to what it is given is, in train mode, the same as b less in its running mean."""
    moved, own = (in_mode(shadow(norm, _as_double), True) for _ in range(2))
    x = _map_like(norm, _SIZES[0])
    bias = torch.arange(1.0, 1 + x.shape[1], dtype=x.dtype, device=x.device)
    _mean_of(moved).sub_(bias)
    outs = []
    for module, given in ((moved, x), (own, x + bias[:, None, None])):
        with quietly(seed=0):
            outs.append(module(given))
    return _is_close(*outs) and _is_close(_mean_of(moved) + bias, _mean_of(own))


def _batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    read = kernels.Norm.of(norm)
    scale = read.weight / torch.sqrt(read.var + read.eps)
    return x * scale[:, None, None] + (read.bias - read.mean * scale)[:, None, None]


def _mean_of(norm: nn.Module) -> Tensor:
    return kernels.Norm.of(norm).mean


def _map_like(norm: nn.Module, size: tuple[int, int, int]) -> Tensor:
    mean, (batch, height, width) = _mean_of(norm), size
    draws = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, len(mean), height, width, generator=draws, dtype=torch.float64)
    return (3 * x).to(mean.device)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


def _is_close(one: object, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return bool((one - other).norm() <= _CLOSE * (1 + other.norm()))
