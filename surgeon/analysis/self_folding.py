"""Modules that fold themselves: their class has a method that merges norms and branches into fewer convs.

RepVGG, MobileOne, RepViT and the networks of ultralytics are built of them. Such a method reads the kernels and norms
of the module's own convs, under their names; what stands there instead has to be a conv and a norm when it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from types import FunctionType

from torch import nn

from surgeon._torch_compat import NormBase
from surgeon.analysis.uses import codes_of
from surgeon.blocks import Block

# What such methods are called, those that one would call first, and whether they are only meant if they can be called
# without arguments: there are methods called `fuse` that add feature maps.
METHODS = {
    "reparameterize": True,  # MobileOne, and timm's RepVGG, FastViT and RepGhost
    "reparametrize": True,
    "reparam": True,
    "structural_reparam": True,
    "switch_to_deploy": True,  # RepVGG, DBB, ACNet, GhostNetV3
    "convert_to_deploy": True,
    "deploy": True,
    "merge_kernel": True,  # RepLKNet
    "repvgg_convert": True,
    "fuse": True,  # ultralytics, LeViT, RepViT, EfficientViT
    "fuse_model": True,  # torchvision.models.quantization
    "fuse_convs": True,  # RepConv of ultralytics
    "fuse_repvgg_block": True,  # YOLOv7
    "fuse_conv_bn": True,
    "fuse_bn": True,
    "fuse_norms": True,
    "fold_bn": True,
    "fold_norms": True,
    "merge_bn": True,
    "forward_fuse": False,
    "fuseforward": False,
    "get_equivalent_kernel_bias": True,
}
# Methods that others call: YOLO's networks switch to the first two when they fold themselves, RepVGGs ask for the last.
PARTS = ("forward_fuse", "fuseforward", "get_equivalent_kernel_bias")
# What says on a module that it has folded itself: a flag that is set, the conv that is left, or branches that are gone.
FLAGS = ("deploy", "deployed", "fused", "infer_mode", "inference_mode", "is_deploy", "is_fused")
LEFT = ("reparam_conv", "rbr_reparam", "lkb_reparam", "dbb_reparam", "fused_conv")
GONE = ("fusion_conv",)  # RepGhost
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

    @property
    def folds_all(self) -> bool:
        """Whether what to call folds all modules of the network."""
        return self.package in _WALKS or not self.path

    def __str__(self) -> str:
        named = f"{self.path} ({self.kind})" if self.path else f"the model ({self.kind})"
        return f"{named} folds itself ({self.method})"


class SelfFoldings:
    """Which modules of a model fold themselves, and have not done so yet: there are norms in them.

    A method that only calls those of other modules, as one of the whole network often does, counts for none itself.
    """

    def __init__(self, model: nn.Module) -> None:
        held = dict(model.named_modules(remove_duplicate=False))
        found = {path: one for path, module in held.items() if (one := _of(path, module)) is not None}
        self._found = {path: one for path, one in found.items() if not _is_done(held[path])}

    def around(self, paths: Iterable[str]) -> SelfFolding | None:
        """Find the innermost one that holds a module, of which all names are given, or is that module.

        One that only has what others call when they fold is given where there is no other.
        """
        around = list[SelfFolding]()
        for path in paths if self._found else ():
            parts = path.split(".")
            above = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
            around += [self._found[name] for name in above if name in self._found]
        whole = [one for one in around if one.method not in PARTS]
        return next(iter([*whole, *around]), None)


def _of(path: str, module: nn.Module) -> SelfFolding | None:
    if isinstance(module, Block):
        return None
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _NOT_THE_USERS or not issubclass(kind, nn.Module):
            continue
        for name, is_bare in METHODS.items():
            value = vars(kind).get(name)
            if inspect.isfunction(value) and not (is_bare and _asks(value)) and _reads(value, module):
                return SelfFolding(path, type(module).__name__, name, package)
    return None


def _is_done(module: nn.Module) -> bool:
    flags, left, gone = ([getattr(module, name, None) for name in names] for names in (FLAGS, LEFT, GONE))
    return (
        any(flag is True for flag in flags)
        or any(isinstance(one, nn.Conv2d) for one in left)
        or any(isinstance(one, Sized) and not len(one) for one in gone)
        or not any(map(_is_batch_norm, module.modules()))
    )


def _reads(method: FunctionType, module: nn.Module) -> bool:
    """Whether a method, or what it calls, names anything that the module holds."""
    keys = [key for key, _ in (*module.named_modules(), *module.named_parameters(), *module.named_buffers())]
    held = {part for key in keys for part in key.split(".")} - {*METHODS, ""}
    waiting, seen = [inspect.unwrap(method)], set[object]()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        words = {word for code in codes_of(function) for word in _words(code.co_names, code.co_consts)}
        if words & held:
            return True
        known = [function.__globals__.get(word) or getattr(type(module), word, None) for word in words]
        waiting += [inspect.unwrap(one) for one in known if isinstance(one, FunctionType)]
    return False


def _words(*values: object) -> Iterator[str]:
    """Give the texts in names and constants; a list of names is a constant, too."""
    for value in values:
        if isinstance(value, tuple | frozenset):
            yield from _words(*value)
        elif isinstance(value, str):
            yield value


def _asks(method: object) -> bool:
    """Whether a method has to be given arguments beside its module."""
    assert callable(method)
    own = [*inspect.signature(method).parameters.values()][1:]
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in own)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, NormBase) or "batchnorm" in type(module).__name__.lower()
