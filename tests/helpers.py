"""What several test files need: norms that are not fresh, narrow networks, one measure of distance."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgeon.app.cli import main
from surgeon.blocks import norms
from surgeon.conv.spec import ConvSpec

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
            if not isinstance(norm, _BatchNorm) and not norms.is_frozen(norm):
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


def check_folds(block: nn.Module, conv: nn.Conv2d, reference: Callable[[Tensor], Tensor]) -> None:
    """Compare a block of 6 channels, in float64 and eval mode, and what it folds to with its paper's equations.

    On noise, and on one impulse at every pixel, those of the borders among them.
    """
    made: Any = block
    noise, impulses = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.eye(72, dtype=torch.float64).view(72, 1, 9, 8)
    for x in (noise, impulses.expand(-1, 6, -1, -1)):
        expected = reference(x)
        assert relative(made(x), expected) < 1e-14
        folded = made.fold()
        assert relative(folded(x), expected) < 1e-12
        assert (folded.kernel_size, folded.padding) == (conv.kernel_size, conv.padding)
        plain, norm = made.fold_keeping_norm()
        assert relative(norm.eval()(plain(x)), expected) < 1e-12


def narrow(model: nn.Module, by: int = 4) -> nn.Module:
    """Give a network that lies on the meta device a fraction of its channels, and numbers: its wiring is as it was.

    Counts of 8 or less stay as they are, and so do those that cannot be divided.
    """

    def less(count: int) -> int:
        return count // by if count > 8 and count % by == 0 else count

    with torch.device("meta"):
        for path, module in [*model.named_modules()]:
            if type(module) is nn.Conv2d:
                spec = ConvSpec.of(module)
                sizes = {"c_in": less(spec.c_in), "c_out": less(spec.c_out), "groups": less(spec.groups)}
                model.set_submodule(path, replace(spec, **sizes).build(like=module.weight))
            elif type(module) is nn.BatchNorm2d:
                model.set_submodule(path, nn.BatchNorm2d(less(module.num_features), module.eps, module.momentum))
            elif type(module) is nn.Linear:
                has_bias = module.bias is not None
                model.set_submodule(path, nn.Linear(less(module.in_features), less(module.out_features), has_bias))
            else:
                assert not [*module.parameters(recurse=False)], f"{path} cannot be made narrow"
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model


def on_meta(build: Callable[[], Module]) -> Module:
    """Build a network without numbers."""
    with torch.device("meta"):
        return build()


def narrow_torchvision(name: str, **options: object) -> nn.Module:
    """Build a network of torchvision with a quarter of its channels."""
    return narrow(on_meta(lambda: torchvision.models.get_model(name, weights=None, **options)))


def write_pickle(path: Path, program: bytes) -> Path:
    """Write a torch archive around a handwritten pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("m/version", "3\n")
        archive.writestr("m/byteorder", "little")
    return path
