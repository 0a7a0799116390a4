"""Convs whose tensors are computed anew at every call, made convs with tensors of their own: baked.

Weight norm, spectral norm and pruning keep other tensors than the weight, and compute it from them in a parametrization
or in a hook before each call. Baking takes that away and keeps what it computes in eval mode, bit by bit, with torch's
own functions, on a copy. For spectral norm this is the weight divided by its norm as estimated so far: no power
iteration is taken any more. For pruning these are the kernels with their zeros, which training may fill again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from surgeon.analysis.obstacles import BAKE, computes_its_tensors
from surgeon.analysis.readers import owners
from surgeon.blocks import Block
from surgeon.errors import PlanError
from surgeon.models.copies import duplicate, in_mode, names, shadow
from surgeon.models.sandbox import one_thread, quietly
from surgeon.surgery.plan import Entry, Plan


@dataclass(slots=True)
class Bakeable:
    """The convs of a network that can be baked, by their first names, and why others cannot."""

    paths: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def bakeable(model: nn.Module) -> Bakeable:
    """Find the convs outside of blocks whose tensors are computed, and try each."""
    found, named, held = Bakeable(), names(model), owners(model)
    inside = {part for block in named if isinstance(block, Block) for part in block.modules()}
    for conv, paths in named.items():
        if conv in inside or not isinstance(conv, nn.Conv2d) or computes_its_tensors(conv) is None:
            continue
        own, others = set(conv.modules()), {m for p in conv.parameters() for m in held[id(p)]}
        if others - own:
            found.reasons[paths[0]] = "what its tensors are computed from is shared with another module"
        elif isinstance(made := baked(conv), str):
            found.reasons[paths[0]] = made
        else:
            found.paths.append(paths[0])
    return found


def all_baked(model: nn.Module) -> nn.Module:
    """Copy a model, sharing its parameters, with every conv baked that can be."""
    bare = shadow(model)
    bake_(bare, bakeable(model).paths)
    return bare


def baked(conv: nn.Conv2d) -> nn.Conv2d | str:
    """Make a copy that computes the same with tensors of its own, or say why that is not possible."""
    try:
        made = _permanent(conv)
    except Exception as error:  # a parametrization may be the user's own code
        return f"its tensors cannot be made permanent: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if (why := computes_its_tensors(made)) is not None:
        return f"torch's own functions do not make its tensors permanent: {why}"
    if not made.weight.is_meta and not _is_same(conv, made):
        return "its tensors are not the same at every call in eval mode, so there are none to keep"
    return made


def bake_(model: nn.Module, paths: Sequence[str], like: nn.Module | None = None) -> Callable[[], None]:
    """Put baked copies into a model, under all names of these convs; returns a function that puts the convs back.

    `like` is the same network in its own dtype, where the model was cast: then what is computed there is cast.

    Raises:
        PlanError: there is nothing to bake at one of the names.
    """
    named, made = names(model), {}
    for path in paths:
        conv = _computing(model, path)
        source = conv if like is None else _computing(like, path)
        one = baked(source)
        if isinstance(one, str):
            raise PlanError(f"{path} cannot be baked: {one}", todo="Take it out of `baked` in the plan.")
        place = next(conv.parameters())
        made[conv] = shadow(one, partial(_moved, to=place)).train(conv.training)
    for conv, one in made.items():
        _set_(model, named[conv], one)

    def undo() -> None:
        for conv in made:
            _set_(model, named[conv], conv)

    return undo


def with_baked(plan: Plan, found: Bakeable, fingerprint: str) -> Plan:
    """Turn the plan for a baked network into one for the network as it is, which bakes the convs that it swaps."""
    swapped = {entry.path for entry in plan.swaps}
    convs = tuple(
        entry.model_copy(update={"skip": found.reasons[entry.path]}) if _is_stuck(entry, found) else entry
        for entry in plan.convs
    )
    used = tuple(path for path in found.paths if path in swapped)
    return plan.model_copy(update={"model": fingerprint, "baked": used, "convs": convs})


def _is_stuck(entry: Entry, found: Bakeable) -> bool:
    """Whether a conv that a rule claims stays because it could not be baked."""
    return entry.path in found.reasons and (entry.skip or "").endswith(BAKE)


def _moved(tensor: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return tensor.to(to.device, to.dtype)


def _computing(model: nn.Module, path: str) -> nn.Conv2d:
    try:
        conv = model.get_submodule(path)
    except AttributeError:
        conv = None
    if path and isinstance(conv, nn.Conv2d) and computes_its_tensors(conv) is not None:
        return conv
    raise PlanError(
        f"the plan bakes {path!r}, and there is no conv of that name whose tensors are computed",
        todo="Take it out of `baked` in the plan.",
    )


def _set_(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    for path in paths:
        model.set_submodule(path, module)


def _permanent(conv: nn.Conv2d) -> nn.Conv2d:
    made = in_mode(duplicate(conv), False)  # a spectral norm takes a step at every call in train mode
    if parametrize.is_parametrized(made):
        _give_own_class_(made)
        held = made.parametrizations
        assert isinstance(held, nn.ModuleDict)
        for name in [*held]:
            parametrize.remove_parametrizations(made, name, leave_parametrized=True)
        for key, wrapped in [*made._load_state_dict_pre_hooks.items()]:  # a reader of older keys, which torch leaves
            if getattr(getattr(wrapped, "hook", None), "__module__", None) == parametrizations.__name__:
                del made._load_state_dict_pre_hooks[key]
    for hook in [*made._forward_pre_hooks.values()]:
        if isinstance(hook, WeightNorm):
            utils.remove_weight_norm(made, hook.name)
        elif isinstance(hook, SpectralNorm):
            utils.remove_spectral_norm(made, hook.name)
    for name in ("weight", "bias"):
        if prune.is_pruned(made) and f"{name}_orig" in made._parameters:
            prune.remove(made, name)  # type: ignore[no-untyped-call]
        if (tensor := made._parameters.pop(name, None)) is not None or name == "bias":
            trained = [one.requires_grad for path, one in conv.named_parameters() if _belongs(path, name)]
            made._parameters[name] = None if tensor is None else nn.Parameter(tensor, any(trained))
    return made.train(conv.training)


def _belongs(path: str, name: str) -> bool:
    """Whether a parameter is what the weight or the bias is computed from: `weight_g`, `parametrizations.weight.…`."""
    return path.removeprefix("parametrizations.").startswith(name)


def _give_own_class_(conv: nn.Conv2d) -> None:
    """Give a copy a class of its own: torch will take a property away from it, which the original still needs."""
    kind = type(conv)
    own: dict[str, Any] = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    conv.__class__ = type(kind.__name__, kind.__bases__, own)


def _is_same(conv: nn.Conv2d, made: nn.Conv2d) -> bool:
    """Whether two calls of the conv in eval mode and one of the baked copy give the same bits."""
    sides = [2 * dilation * kernel for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
    place = next(conv.parameters())
    x = torch.randn(1, conv.in_channels, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(place.device, place.dtype)
    with quietly(), one_thread(), torch.no_grad():
        first, second, ours = (in_mode(duplicate(one), False)(x) for one in (conv, conv, made))
    return torch.equal(first, ours) and torch.equal(second, ours)
