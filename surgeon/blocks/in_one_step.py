"""Whether the branches of a block can be computed in one step of autograd (`one_pass.branches`), and that step.

They can in train mode, where every branch is an ordinary conv and an ordinary batch norm: called as torch calls them,
without hooks that somebody waits for. Everything else goes step by step, also where torch itself looks into the steps:
torch.compile, tracing, transforms of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from surgeon import _torch_compat as compat
from surgeon.blocks.activations import is_left_alone
from surgeon.conv.gradients import Moves
from surgeon.one_pass import branches, where
from surgeon.one_pass.branches import Normed
from surgeon.one_pass.normed_sum import Statistics

is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined] # TorchScript knows it

PLAIN = (Tensor, nn.Parameter)


class Part(NamedTuple):
    """One branch of a block: the input of its conv, the conv, the norm behind it."""

    input: Tensor
    conv: nn.Module
    norm: nn.Module


def fits(parts: Sequence[Part]) -> bool:
    """Whether one step gives what calling the parts one by one gives."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched():
        return False
    given = [one.input for one in parts]
    if any(type(x) not in PLAIN or x.dim() != 4 or not x.numel() for x in given):
        return False
    if not all(_is_ordinary_conv(one.conv) and _is_ordinary_norm(one.norm) for one in parts):
        return False
    tensors = [*given, *(t for one in parts for t in _tensors_of(one))]
    if any(type(t) not in PLAIN or t.device != given[0].device or not t.is_floating_point() for t in tensors):
        return False
    if not any(t.requires_grad for t in tensors):
        return False
    return given[0].device.type == "cpu" or (given[0].is_cuda and where.has_triton())


def run(parts: Sequence[Part]) -> Tensor:
    """Sum the branches, if they fit."""
    sources = list({id(one.input): one.input for one in parts}.values())
    convs, norms = [cast(nn.Conv2d, one.conv) for one in parts], [cast(nn.BatchNorm2d, one.norm) for one in parts]
    normed = [
        Normed(next(i for i, x in enumerate(sources) if x is one.input), moves_of(conv), _counted(norm))
        for one, conv, norm in zip(parts, convs, norms, strict=True)
    ]
    kernels: list[Tensor] = [conv.weight for conv in convs]
    device = sources[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        sources, kernels = (
            [t if t.dtype == torch.float64 else t.to(dtype) for t in many] for many in (sources, kernels)
        )
    scales, shifts = [norm.weight for norm in norms], [norm.bias for norm in norms]
    return branches.run(normed, sources, [*kernels, *scales, *shifts])


def moves_of(conv: nn.Conv2d) -> Moves:
    """Read how a conv without padding modes moves."""
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    sh, sw = conv.stride
    ph, pw = (dh * (kh - 1) // 2, dw * (kw - 1) // 2) if conv.padding == "same" else (0, 0)
    if not isinstance(conv.padding, str):
        ph, pw = conv.padding
    return Moves((sh, sw), (ph, pw), (dh, dw), conv.groups)


def is_watched() -> bool:
    """Whether somebody wants to see every step."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or compat.has_hooks_on_all_modules() or compat.is_transformed()


def _is_ordinary(module: nn.Module, kind: type[nn.Conv2d] | type[nn.BatchNorm2d]) -> bool:
    return type(module) is kind and kind.forward is _FORWARD[kind] and is_left_alone(module)


def _is_ordinary_conv(conv: nn.Module) -> bool:
    return _is_ordinary(conv, nn.Conv2d) and conv.bias is None and conv.padding_mode == "zeros"


def _is_ordinary_norm(norm: nn.Module) -> bool:
    return _is_ordinary(norm, nn.BatchNorm2d) and norm.training and bool(norm.track_running_stats)


def _tensors_of(part: Part) -> list[Tensor]:
    norm = part.norm
    given = (part.conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [t for t in given if t is not None]  # type: ignore[misc] # ordinary ones have tensors there


def _counted(norm: nn.BatchNorm2d) -> Statistics:
    """Count one more batch, as torch does, and say how much the running statistics follow it."""
    momentum, count = norm.momentum, norm.num_batches_tracked
    if count is not None:
        count.add_(1)
        momentum = 1 / float(count) if momentum is None else momentum
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return Statistics(norm.running_mean, norm.running_var, momentum or 0.0, norm.eps)


_FORWARD: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d)
}  # as torch calls them
