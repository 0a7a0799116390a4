"""A network of the zoo before surgeon sees it: built, given numbers that hide no mistake, and run in plain torch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_record import Case

import surgeon


def build(case: Case) -> nn.Module:
    """Make the network as surgeon would, with numbers that hide no mistake."""
    return shake_(surgeon.load(case.name, arch_args=case.arguments).eval())


def shake_(model: nn.Module) -> nn.Module:
    """Give small random changes to every parameter and statistic whose numbers are all the same.

    A fresh norm, a layer scale of 1e-6, a head of zeros, and a strip of an ACBlock before training let every mistake
    through.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name.rpartition(".")[0] in norms]
    for name, tensor in (*model.named_parameters(), *buffers):
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            low, high = (0.5, 2.0) if name.endswith("running_var") else (0.3, 1.0)
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low
            if sum(side > 1 for side in tensor.shape) > 1 or name.endswith(("bias", "running_mean", "beta")):
                noise = (noise - (low + high) / 2) * 0.3
            tensor.data.copy_(noise)
    return model


def calibrate_(model: nn.Module, example: Sequence[Any]) -> nn.Module:
    """Set the statistics of every batch norm near those of what goes through it.

    With other statistics the signal dies out in a deep network, and a comparison shows nothing.
    """
    generator = torch.Generator().manual_seed(1)

    def set_(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().double()
        means = x.transpose(0, 1).flatten(1).mean(1) / 3  # all of it, and only differences would be left
        size = x.square().mean() + 0.003
        noise = torch.rand(2, len(means), generator=generator, dtype=torch.float64)
        norm.running_mean.copy_(means + (noise[0] - 0.5) * 0.2 * size.sqrt())
        norm.running_var.copy_(size * 4.0 ** (noise[1] - 0.5))  # 0.5 to 2 times

    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    hooks = [norm.register_forward_pre_hook(set_) for norm in norms]
    try:
        outputs(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def example_for(case: Case, channels: int, side: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """Make what is handed to the network: an image, a pair of them, a clip, or a list of images for a detector."""
    generator = torch.Generator().manual_seed(seed)
    kind = torchvision_kind(case)
    shape = (1, channels, *([16] if kind == "video" else []), side, side)
    count = 2 if kind == "optical_flow" else 1
    images = [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    return ([image[0] for image in images],) if kind == "detection" else tuple(images)


def torchvision_kind(case: Case) -> str:
    """Say to which part of torchvision.models a network belongs: '' for classification and for timm."""
    library, _, name = case.name.partition(":")
    if library != "torchvision":
        return ""
    return (torchvision.models.get_model_builder(name).__module__.split(".")[2:-1] or [""])[0]


def outputs(model: nn.Module, example: Sequence[Any]) -> list[Tensor]:
    """Run a network; return all floating point tensors in its output that hold numbers."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, example))
    out = vars(out) if hasattr(out, "__dataclass_fields__") else out
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def distance(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Relative L2 of the output that is furthest apart; infinite where shapes differ."""
    if [t.shape for t in after] != [t.shape for t in before]:
        return math.inf
    pairs = zip(after, before, strict=True)
    return max(((b - a).norm() / a.norm().clamp_min(1e-300)).item() for b, a in pairs)


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """Copy a network, with every weight moved by one unit in the last place."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps * torch.sign(torch.randn_like(parameter)))
    return model
