"""Blocks → plain convs, and norms → the convs before them.

Each block decides what it folds to (`Foldable.fold`, `Deployable.deploy`); here every block of a model is folded,
under all its names. A block that no single conv can replace first takes in the norm behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from surgeon._torch_compat import ConvNd
from surgeon.analysis import convs
from surgeon.analysis.network import Network
from surgeon.analysis.obstacles import custom_call, norms_behind, norms_behind_others
from surgeon.blocks import Block, Deployable, Foldable, contract, norms
from surgeon.blocks.base import PLAIN
from surgeon.conv import kernels
from surgeon.conv.numbers import cast
from surgeon.conv.spec import ConvSpec
from surgeon.errors import PlanError
from surgeon.models.copies import shadow
from surgeon.models.memory import give_back_after
from surgeon.octave import rewrite as seams
from surgeon.proof.distance import as_double
from surgeon.surgery import give_back
from surgeon.surgery.finite import finite
from surgeon.surgery.give_back import Paths, Return
from surgeon.surgery.history import RULES

_TODO = "Undo what was changed since it was converted, or train and deploy it unfolded."
_OTHER_FORM = "Upgrade surgeon if a later version has written the file: pip install -U conv-surgeon."


def fold_blocks_(
    network: Network,
    *,
    dense: bool = False,
    returns: Mapping[Paths, Return] | None = None,
    deploys: bool = True,
    rules: int = RULES,
    dtypes: dict[nn.Module, torch.dtype] | None = None,
    forms: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Replace every block of a network by the conv it folds to, or by its deployment form; returns their names.

    Blocks that cost less than one conv are deployed in several, unless `dense` asks for that conv. Those in `returns`
    become a conv and the norm that they have taken over. Without `deploys`, no block gets its deployment form. `rules`
    are those by which a recorded operation was carried out. With `dtypes`, what blocks fold to stays in float64, since
    it will be a part of something else that is folded; noted there is the dtype that each of these convs is to have.
    `forms` names the form in which a block is deployed, where that is not the plain one.

    The running statistics are folded in, whatever mode the model is in; the mode stays the same.

    Raises:
        PlanError: a block that cannot be folded as it is now; nothing is done.
    """
    model = network.model
    blocks = foldable(network, dense=dense)
    stood = {paths: module for module, paths in network.names.items()}
    folded: dict[Paths, nn.Module] = {}
    for paths, block in blocks:
        if (origin := (returns or {}).get(paths)) is not None:
            folded |= give_back.make(paths, block, origin, stood.get(origin.norm))
        else:
            source = block if dtypes is None else shadow(block, as_double)
            folded[paths] = conv = finite(paths[0], "folded", partial(fold_alone, source), block)
            if dtypes is not None:
                dtypes[conv] = next(block.parameters()).dtype
    deployed, folded_in = _deployed(network, rules, folded, forms or {}) if deploys else ({}, {})
    rests = {paths: norms.plain_rest(m) for paths, m in stood.items() if isinstance(m, norms.NormRest)}
    rests = {paths: rest for paths, rest in rests.items() if blocks and paths not in folded}
    for paths, made in (folded | deployed).items():  # all are built, so nothing can fail half-way
        for path in paths:
            model.set_submodule(path, made)
    for paths, rest in (folded_in | rests).items():
        for path in paths:
            model.set_submodule(path, rest)
    if deployed:
        seams.deploy_(model, absorbs=rules >= 3)
    return tuple(paths[0] for paths in (*dict(blocks), *deployed))


def foldable(network: Network, *, dense: bool) -> list[tuple[Paths, Foldable]]:
    """List the blocks that fold to one conv, once it is known that all of them can."""
    blocks = [
        (paths, m) for m, paths in network.names.items() if isinstance(m, Foldable) and (dense or m.folds_for_free)
    ]
    for paths, block in blocks:
        alone = "it is the whole model; call its fold() to make the conv" if "" in paths else None
        if why := alone or _customised(block) or block.unfoldable():
            raise PlanError(f"{paths[0] or 'the model'} cannot be folded: {why}", todo=_TODO)
    return blocks


def rules_for(network: Network, *, dense: bool = False) -> int:
    """Give the first rules of folding that do to the blocks of a network what today's do."""
    blocks = [m for m in network.names if isinstance(m, Deployable) and not (dense and isinstance(m, Foldable))]
    return max((block.deployed_so_since for block in blocks if block.undeployable() is None), default=1)


def to_deploy(network: Network, *, dense: bool = False) -> dict[Paths, Deployable[Any]]:
    """List the blocks that today's rules deploy in several convs, with the norms that they take in.

    Raises:
        PlanError: a block that cannot be folded as it is now.
    """
    return _to_deploy(network, RULES, [paths for paths, _ in foldable(network, dense=dense)])[0]


def _to_deploy(
    network: Network, rules: int, folded: Collection[Paths]
) -> tuple[dict[Paths, Deployable[Any]], dict[Paths, nn.Module]]:
    """List the blocks that have a form to be deployed in, with their norms; and what is left of norms folded in so.

    A block that is the whole model stays: no module holds it.
    """
    blocks = {
        paths: m
        for m, paths in network.names.items()
        if isinstance(m, Deployable) and m.deployed_since <= rules and paths not in folded and "" not in paths
    }
    blocks = {paths: block for paths, block in blocks.items() if block.undeployable() is None}
    for paths, block in blocks.items():
        if why := _customised(block):
            raise PlanError(f"{paths[0]} cannot be folded: {why}", todo=_TODO)
    rests: dict[tuple[str, ...], nn.Module] = {}
    for paths, norm_paths in norms_behind(network) if blocks else ():
        norm = network.model.get_submodule(norm_paths[0])
        if paths not in blocks:
            continue
        block, how, core = blocks[paths], f"folded with {norm_paths[0]}", norms.core_of(norm)
        if (made := finite(paths[0], how, partial(block.with_norm, core), block, core)) is not None:
            blocks[paths] = made
            rests[norm_paths] = norms.plain_rest(norm)
    return blocks, rests


def forms_on(network: Network, device: torch.device | None) -> dict[str, str]:
    """Name the forms in which blocks are deployed on a device if nothing is measured, but for the plain ones."""
    blocks = {
        paths[0]: m
        for m, paths in network.names.items()
        if isinstance(m, Deployable) and not isinstance(m, Foldable) and "" not in paths and m.undeployable() is None
    }
    forms = {path: block.form_on("cpu" if device is None else device.type) for path, block in blocks.items()}
    return {path: form for path, form in forms.items() if form != PLAIN}


def _deployed(
    network: Network, rules: int, folded: Collection[Paths], forms: Mapping[str, str]
) -> tuple[dict[Paths, nn.Module], dict[Paths, nn.Module]]:
    """Make the form of every block in which it is deployed, and what is left of the norms that were folded in."""
    blocks, rests = _to_deploy(network, rules, folded)
    if unknown := [path for path in forms if path not in {paths[0] for paths in blocks}]:
        raise PlanError(f"{unknown[0]} is no block that has forms to be deployed in", todo=_OTHER_FORM)
    made = {}
    for paths, block in blocks.items():
        known, wanted = contract.forms(block), forms.get(paths[0], PLAIN)
        if wanted not in known:
            names = ", ".join(known)
            raise PlanError(f"{paths[0]} has no form {wanted!r}: there are {names}", todo=_OTHER_FORM)
        made[paths] = finite(paths[0], "folded", known[wanted], block)
    return made, rests


def fold_norms_(
    network: Network, only: Collection[str] | None = None, *, may_fold: Callable[[nn.Module], bool] | None = None
) -> tuple[str, ...]:
    """Fold every batch norm that belongs to one conv or block alone into it, in eval mode; returns the norms' names.

    This is done in float64 and cast once. What the class of a norm does besides takes its place, or an Identity.
    Transposed convs and those of one or three dimensions are convs here, too. `only` names the norms to fold, as a
    history has recorded them; `may_fold` is asked of every conv.
    """
    model, folded = network.model, {}
    for paths, norm_paths in (*norms_behind(network), *norms_behind_others(network)):
        if only is not None and norm_paths[0] not in only:
            continue
        if may_fold is not None and not may_fold(model.get_submodule(paths[0])):
            continue
        module, norm = model.get_submodule(paths[0]), norms.core_of(model.get_submodule(norm_paths[0]))
        made_by = _with_norm if isinstance(module, nn.Conv2d) else _other_with_norm
        make = partial(module.with_norm, norm) if isinstance(module, Block) else partial(made_by, module, norm)
        if (made := finite(paths[0], f"folded with {norm_paths[0]}", make, module, norm)) is not None:
            folded[norm_paths] = (paths, made)
    for norm_paths, (paths, made) in folded.items():
        for path in paths:
            model.set_submodule(path, made)
        rest = norms.plain_rest(model.get_submodule(norm_paths[0]))
        for path in norm_paths:
            model.set_submodule(path, rest)
    return tuple(norm_paths[0] for norm_paths in folded)


def _with_norm(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    spec = convs.read(conv)
    assert isinstance(spec, ConvSpec)  # no norm belongs to another one
    kernel, bias = kernels.with_norm(conv.weight, conv.bias, norm)
    return spec.build_with(kernel, bias, like=conv.weight).train(conv.training)


def _other_with_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold a norm into a transposed conv, or into one of other dimensions: a copy of it with other tensors.

    A transposed conv has its filters on the second axis, (in, out/groups, …), group by group.
    """
    assert isinstance(conv, ConvNd)
    numbers = kernels.Norm.of(norm).double()
    scale = numbers.weight / torch.sqrt(numbers.var + numbers.eps)
    bias = -numbers.mean if conv.bias is None else conv.bias.detach().double() - numbers.mean
    weight = conv.weight.detach().double()
    ones = [1] * (weight.dim() - 2)
    if conv.transposed:
        grouped = weight.view(conv.groups, -1, *weight.shape[1:]) * scale.view(conv.groups, 1, -1, *ones)
        weight = grouped.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    made, trains = shadow(conv), conv.weight.requires_grad
    made.weight = nn.Parameter(cast(weight, conv.weight.dtype, "weight"), trains)
    made.bias = nn.Parameter(cast(numbers.bias + bias * scale, conv.weight.dtype, "bias"), trains)
    return made


def fold_alone(block: nn.Module) -> nn.Conv2d:
    """Fold one block, in the class of the conv that it has replaced, and free what that took."""
    assert isinstance(block, Foldable)
    conv = convs.again(block.origin, contract.fold(block))
    give_back_after(conv.weight)
    return conv


def _customised(block: nn.Module) -> str | None:
    """Say what was added to a block, or to one of its submodules, that a plain conv would not have."""
    for name, module in block.named_modules():
        if custom := custom_call(module, f"its {name}" if name else "it"):
            return custom
    return None
