"""Foldable blocks → plain convs, and norms → the convs before them.

What a block folds to is its own business (`Foldable.fold`); here every block of a model is folded, under all its names.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgeon import kernels
from surgeon.blocks import Block, Foldable
from surgeon.capture import names
from surgeon.errors import PlanError
from surgeon.memory import give_back_after
from surgeon.sites import custom_call, norms_behind
from surgeon.spec import ConvSpec

_TODO = "Undo what was done to it since it was converted, or train and deploy it unfolded."


def fold_blocks_(model: nn.Module, *, dense: bool = False) -> tuple[str, ...]:
    """Replace every foldable block of `model` by the conv it folds to; returns their names.

    Blocks that cost less than that conv stay, unless `dense` asks for them too.

    The running statistics are what is folded in, whatever mode the model is in; that mode is left as it is.

    Raises:
        PlanError: a block that cannot be folded as it is now; nothing is done.
    """
    blocks = [
        (paths, m) for m, paths in names(model).items() if isinstance(m, Foldable) and (dense or m.folds_for_free)
    ]
    for paths, block in blocks:
        alone = "it is the whole model; its own fold() makes the conv" if "" in paths else None
        if why := alone or _customised(block) or block.unfoldable():
            raise PlanError(f"{paths[0] or 'the model'} cannot be folded: {why}", todo=_TODO)
    folded = {paths: _fold(block) for paths, block in blocks}  # first all, then none can fail half-way
    for paths, conv in folded.items():
        for path in paths:
            model.set_submodule(path, conv)
    return tuple(paths[0] for paths in folded)


def fold_norms_(model: nn.Module) -> tuple[str, ...]:
    """Fold every batch norm that belongs to one conv or block alone into it, in eval mode; returns the norms' names.

    Done in float64 and cast once. What is left of a norm is an Identity.
    """
    folded = {}
    for paths, norm_paths in norms_behind(model):
        module, norm = model.get_submodule(paths[0]), model.get_submodule(norm_paths[0])
        assert isinstance(norm, _BatchNorm)
        made = module.with_norm(norm) if isinstance(module, Block) else _with_norm(module, norm)
        if made is not None:
            folded[norm_paths] = (paths, made)
    for norm_paths, (paths, made) in folded.items():
        for path in paths:
            model.set_submodule(path, made)
        for path in norm_paths:
            model.set_submodule(path, nn.Identity())
    return tuple(norm_paths[0] for norm_paths in folded)


def _with_norm(conv: nn.Module, norm: _BatchNorm) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    made = ConvSpec.of(conv).change(bias=True).build(like=conv.weight)
    with torch.no_grad():
        bias = None if conv.bias is None else conv.bias.double()
        kernel, bias = kernels.fold_bn(conv.weight.double(), bias, kernels.Norm.of(norm).double())
        made.weight.copy_(kernel)
        assert made.bias is not None
        made.bias.copy_(bias)
    return made.train(conv.training)


def _fold(block: Foldable) -> nn.Conv2d:
    conv = block.fold()
    give_back_after(conv.weight)
    return conv


def _customised(block: Foldable) -> str | None:
    """Say what somebody has added to a block or to one of its parts that a plain conv would not have."""
    for name, module in block.named_modules():
        if custom := custom_call(module, f"its {name}" if name else "it"):
            return custom
    return None
