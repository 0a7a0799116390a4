"""What several test files need: norms that are not fresh, one measure of distance, the command line."""

from __future__ import annotations

from typing import TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgeon.app.cli import main

Module = TypeVar("Module", bound=nn.Module)


def shake_(model: Module, seed: int = 0, *, gently: bool = False) -> Module:
    """Give every norm statistics and affine parameters that hide no mistake; `gently` where a deep net must stay sane.

    A fresh norm has mean 0, variance 1, weight 1, bias 0: every fold mistake is invisible. The numbers are drawn in
    float64 and cast, so that a model gets the same ones in any dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for norm in model.modules():
            if not isinstance(norm, _BatchNorm):
                continue
            if norm.running_mean is not None and norm.running_var is not None:
                normal_(norm.running_mean, 0.1 if gently else 1)
                uniform_(norm.running_var, *((0.5, 2) if gently else (0.2, 3)))
            if norm.weight is not None and gently:
                uniform_(norm.weight, 0.3, 1)
            elif norm.weight is not None:
                normal_(norm.weight, 1)
            if norm.bias is not None:
                normal_(norm.bias, 0.1 if gently else 1)
    return model


def run_surgeon(*arguments: object) -> int:
    """Run a command; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def relative(b: Tensor, a: Tensor) -> float:
    """Distance of b from a as a fraction of a, in L2 and float64; a NaN makes it NaN, which no bound admits."""
    assert b.shape == a.shape, f"{tuple(b.shape)} is not {tuple(a.shape)}"
    a, b = a.detach().double(), b.detach().double()
    return float((b - a).norm() / a.norm().clamp_min(1e-300))


def narrow(name: str) -> nn.Module:
    """Build a network of torchvision with 40 features in its dense layers, which hold nine tenths of its numbers."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        first, *others = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
        model.set_submodule(first, nn.Linear(model.get_submodule(first).in_features, 40))
        for path in others:
            model.set_submodule(path, nn.Linear(40, 40))
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model
