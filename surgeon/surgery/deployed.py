"""What `fuse` makes of a block, on paper: the plain conv that it folds to, built without numbers, and its cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from surgeon.blocks import Block, BlockOptions, Foldable, contract
from surgeon.conv.spec import ConvSpec


@dataclass(frozen=True, slots=True)
class Folded:
    """The conv that a block folds to."""

    params: int
    share: float  # of the multiply-adds of the conv that the block replaced


@functools.lru_cache(maxsize=4096)
def folded(block: type[Block], spec: ConvSpec, options: BlockOptions, *, with_norm: bool) -> Folded | None:
    """Say what a block folds to; None for a block that `fuse` leaves as it is, or deploys as several convs.

    >>> from surgeon.blocks.acblock import ACBlock
    >>> folded(ACBlock, ConvSpec(3, 8, (3, 3)), ACBlock.Options(), with_norm=True)
    Folded(params=224, share=1.0)
    """
    if not (issubclass(block, Foldable) and block.folds_for_free):
        return None
    with torch.device("meta"):
        conv = spec.build(like=torch.empty(0))
        norm = nn.BatchNorm2d(spec.c_out) if with_norm else None
    try:
        made = contract.from_conv(block, conv, options, norm=norm, generator=torch.Generator())
        plain = contract.fold(made) if isinstance(made, Foldable) else conv
    except Exception:  # a block of another distribution that cannot do this without numbers
        return None
    return Folded(sum(one.numel() for one in plain.parameters()), plain.weight.numel() / conv.weight.numel())
