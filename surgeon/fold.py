"""Foldable blocks → plain convs.

What a block folds to is its own business (`Foldable.fold`); here every block of a model is folded, under all its names.
"""

from __future__ import annotations

from torch import nn

from surgeon.blocks import Foldable
from surgeon.capture import names


def fold_blocks_(model: nn.Module, *, dense: bool = False) -> tuple[str, ...]:
    """Replace every foldable block of `model` by the conv it folds to; returns their names.

    Blocks that cost less than that conv stay, unless `dense` asks for them too.

    The running statistics are what is folded in, whatever mode the model is in; that mode is left as it is.
    """
    blocks = [
        (paths, m) for m, paths in names(model).items() if isinstance(m, Foldable) and (dense or m.folds_for_free)
    ]
    folded = {paths: block.fold() for paths, block in blocks}  # first all, then none can fail half-way
    for paths, conv in folded.items():
        for path in paths:
            model.set_submodule(path, conv)
    return tuple(paths[0] for paths in folded)
