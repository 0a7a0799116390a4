"""Fold the blocks of a large network one after the other, so that its blocks and their convs are never held together.

What can fail is tried first, on a copy that shares all tensors with the network: every block is folded and thrown away,
and the copy, in which each of these convs is folded when it is called and thrown away behind that, is run. Only then is
anything placed. An interruption while they are placed leaves a network of blocks and convs that computes the same, and
can be folded again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from surgeon.analysis.network import Network
from surgeon.blocks import Deployable, norms
from surgeon.errors import PassError, SurgeonError
from surgeon.models.copies import shadow, where
from surgeon.surgery.finite import finite
from surgeon.surgery.fold import fold_alone, foldable
from surgeon.surgery.give_back import Paths

LARGE = 2**28  # bytes of blocks; smaller ones can be held twice, and are put back if anything fails


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A network as it will be, to run and to throw away, and the names of its blocks and of what is left of norms."""

    copy: nn.Module
    blocks: tuple[Paths, ...]
    rests: tuple[Paths, ...]


def rehearse(network: Network, *, dense: bool) -> Rehearsed | None:
    """Fold every block of a large network on a copy; None if it is not large, or has blocks that are deployed.

    Raises:
        PlanError: a block that cannot be folded as it is now.
    """
    blocks = foldable(network, dense=dense)
    size = sum(one.numel() * one.element_size() for _, block in blocks for one in block.parameters())
    alone: set[nn.Module] = {block for _, block in blocks}
    if size < LARGE or any(isinstance(m, Deployable) and m not in alone for m in network.names):
        return None
    copy = shadow(network.model)
    for paths, block in blocks:
        made = finite(paths[0], "folded", partial(fold_alone, block), block)
        _empty_(made, _folding(block))
        _put_(copy, paths, made)
    rests = {paths: m for m, paths in network.names.items() if isinstance(m, norms.NormRest)}
    for paths, rest in rests.items():
        _put_(copy, paths, norms.plain_rest(rest))
    return Rehearsed(copy, tuple(paths for paths, _ in blocks), tuple(rests))


def place_(model: nn.Module, blocks: Sequence[Paths], rests: Sequence[Paths]) -> tuple[str, ...]:
    """Put in place of every block the conv that it folds to, and free the block; returns their names.

    Nothing else may hold the blocks, or they stay where they are held.

    Raises:
        PassError: one cannot be folded, although it could before; those before it are.
    """
    gc.collect()  # graphs and what they were made of hold each other
    for paths in blocks:
        try:
            _put_(model, paths, fold_alone(model.get_submodule(paths[0])))
        except SurgeonError:
            raise
        except Exception as error:
            raise PassError("fuse", f"{paths[0]} could be folded before, and now not: {where(error)}") from error
    for paths in rests:
        rest = model.get_submodule(paths[0])
        assert isinstance(rest, norms.NormRest)
        _put_(model, paths, norms.plain_rest(rest))
    return tuple(paths[0] for paths in blocks)


def _put_(model: nn.Module, paths: Paths, module: nn.Module) -> None:
    for path in paths:
        model.set_submodule(path, module)


def _folding(block: nn.Module) -> Callable[[], nn.Module]:
    """Give a function that folds a block; a copy of a function holds what the function does."""
    return lambda: fold_alone(block)


def _empty_(conv: nn.Module, again: Callable[[], nn.Module]) -> None:
    """Take the numbers out of a conv; while it is called it has those of another one that is made for the call.

    Whoever reads them at another time reads NaN, which shows.
    """
    for name, parameter in conv._parameters.items():
        if parameter is not None:
            nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            conv._parameters[name] = nn.Parameter(nothing.expand(parameter.shape), parameter.requires_grad)

    def fill(module: nn.Module, args: Any) -> None:
        vars(module).setdefault("_emptied", []).append(dict(module._parameters))
        module._parameters.update(again()._parameters)

    def empty(module: nn.Module, args: Any, out: Any) -> None:
        module._parameters.update(vars(module)["_emptied"].pop())

    conv.register_forward_pre_hook(fill)
    conv.register_forward_hook(empty, always_call=True)
