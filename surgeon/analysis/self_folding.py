"""Modules that fold themselves: their class has a method that merges norms and branches into fewer convs.

RepVGG, MobileOne, RepViT and the networks of ultralytics are built of them. Such a method reads the kernels and norms
of the module's own convs, under their names; what stands there instead has to be a conv and a norm when it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from surgeon._torch_compat import NormBase
from surgeon.blocks import Block

# What such methods are called, and whether they are only meant if they can be called without arguments: there are
# methods called `fuse` that add feature maps. The list grows by what libraries call theirs.
METHODS = {
    "convert_to_deploy": True,  # GhostNet
    "deploy": True,
    "fold_bn": True,
    "fold_norms": True,
    "forward_fuse": False,  # the forward that ultralytics switches to
    "fuse": True,  # ultralytics, LeViT, RepViT, EfficientViT
    "fuse_bn": True,
    "fuse_conv_bn": True,
    "fuse_convs": True,  # RepConv of ultralytics
    "fuse_model": True,  # torchvision.models.quantization
    "fuse_norms": True,
    "fuse_repvgg_block": True,  # YOLOv7
    "fuseforward": False,  # YOLOv5 to YOLOv7
    "get_equivalent_kernel_bias": True,
    "merge_bn": True,
    "merge_kernel": True,  # RepLKNet
    "reparam": True,
    "reparameterize": True,  # MobileOne, and timm's RepVGG, FastViT and RepGhost
    "reparametrize": True,
    "repvgg_convert": True,
    "structural_reparam": True,
    "switch_to_deploy": True,  # RepVGG, DBB, ACNet
}
_NOT_THE_USERS = ("torch", "surgeon")
_WALKS = {"timm": "timm.utils.reparameterize_model(model)"}  # what folds all modules of a library's networks


@dataclass(frozen=True, slots=True)
class SelfFolding:
    """A module that folds itself: its name, its class, and the method that does it."""

    path: str
    kind: str
    method: str
    package: str

    @property
    def how(self) -> str:
        """Say what to call so that it folds itself."""
        place = f"model.{self.path}" if self.path else "model"
        return _WALKS.get(self.package, f"{place}.{self.method}()")

    def __str__(self) -> str:
        named = f"{self.path} ({self.kind})" if self.path else f"the model ({self.kind})"
        return f"{named} folds itself ({self.method})"


class SelfFoldings:
    """Which modules of a model fold themselves, and have not done so yet: there are norms in them."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[str, SelfFolding] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if (one := _of(path, module)) is not None and any(map(_is_batch_norm, module.modules())):
                self._found[path] = one

    def around(self, paths: Iterable[str]) -> SelfFolding | None:
        """Find the innermost one that holds a module, of which all names are given, or is that module."""
        for path in paths if self._found else ():
            parts = path.split(".")
            for length in range(len(parts), -1, -1):
                if (found := self._found.get(".".join(parts[:length]))) is not None:
                    return found
        return None


def _of(path: str, module: nn.Module) -> SelfFolding | None:
    if isinstance(module, Block):
        return None
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _NOT_THE_USERS or not issubclass(kind, nn.Module):
            continue
        for name, value in vars(kind).items():
            if name in METHODS and inspect.isfunction(value) and not (METHODS[name] and _asks(value)):
                return SelfFolding(path, type(module).__name__, name, package)
    return None


def _asks(method: object) -> bool:
    """Whether a method has to be given arguments beside its module."""
    assert callable(method)
    own = [*inspect.signature(method).parameters.values()][1:]
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in own)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, NormBase) or "batchnorm" in type(module).__name__.lower()
