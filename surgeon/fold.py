"""Foldable blocks → plain convs.

What a block folds to is its own business (`Foldable.fold`); here every block of a model is folded, under all its names.
"""

from __future__ import annotations

from torch import nn

from surgeon.blocks import Foldable
from surgeon.capture import names
from surgeon.errors import PlanError
from surgeon.sites import custom_call

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
    folded = {paths: block.fold() for paths, block in blocks}  # first all, then none can fail half-way
    for paths, conv in folded.items():
        for path in paths:
            model.set_submodule(path, conv)
    return tuple(paths[0] for paths in folded)


def _customised(block: Foldable) -> str | None:
    """Say what somebody has added to a block or to one of its parts that a plain conv would not have."""
    for name, module in block.named_modules():
        if custom := custom_call(module, f"its {name}" if name else "it"):
            return custom
    return None
