"""What of a converted network is fitted, in which order, and to what: every unit is a module and its original.

A unit is a block that approximates a conv, or a conv or linear layer behind one. The latter were not converted, but
what they see has changed, and they can make up for part of that at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis import functional, sites
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Site, Survey
from surgeon.blocks import Block, contract, norms
from surgeon.blocks.fittable import Fittable, Path, View
from surgeon.conv.kernels import Norm
from surgeon.conv.spec import ConvSpec
from surgeon.errors import FitError
from surgeon.fitting.data import Data
from surgeon.fitting.watch import copied, watched
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow
from surgeon.surgery.bake import bake_
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Plan
from surgeon.surgery.replay import in_order_of

_ORIGINAL = "Give the network that it was converted from."


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One module that is fitted (`made`), the one that it is fitted to (`original`), and the norm behind each."""

    path: str
    made: nn.Module
    original: nn.Module
    norm: nn.Module | None = None
    norm_before: nn.Module | None = None
    calls: int = 1

    @property
    def is_block(self) -> bool:
        return isinstance(self.made, Fittable)

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias to be fitted: its own, or the mean that the norm behind takes away."""
        return self.norm is not None or getattr(self.made, "bias", None) is not None

    @property
    def kernel(self) -> Tensor:
        """The original's kernel in float64; of a linear layer as that of a 1×1 conv."""
        weight: Tensor = self.original.weight  # type: ignore[assignment]
        return weight.detach().double().reshape(*weight.shape, *([1] * (4 - weight.dim())))

    @property
    def scale(self) -> Tensor:
        """The factor that the norm behind multiplies each channel by; ones without a norm. (out,) in float64."""
        ones = torch.ones(len(self.kernel), dtype=torch.float64, device=self.kernel.device)
        if self.norm_before is None:
            return ones
        numbers = Norm.of(norms.core_of(self.norm_before)).double()
        return (ones * numbers.weight / torch.sqrt(numbers.var + numbers.eps)).detach()

    def views(self, args: Sequence[Any]) -> Sequence[View]:
        """Say what its filters see in one call."""
        if isinstance(self.made, Fittable):
            return contract.views(self.made, args)
        x = args[0]
        if isinstance(self.made, nn.Linear):
            x = x.reshape(-1, x.shape[-1])[:, :, None, None]
        spec = _spec(self.made)
        return (View("all", ((0, spec.c_out),), (Path(x, spec, ((0, spec.c_in // spec.groups),)),)),)

    def wanted(self, output: Tensor) -> Tensor:
        """What the original gave, as a map (n, out, h, w)."""
        return output.reshape(-1, output.shape[-1])[:, :, None, None] if isinstance(self.made, nn.Linear) else output

    def is_called_with(self, args: Sequence[Any]) -> bool:
        """Whether a call is one that can be fitted."""
        return len(args) == 1 and (self.is_block or isinstance(args[0], Tensor))


def _spec(module: nn.Module) -> ConvSpec:
    if isinstance(module, nn.Linear):
        return ConvSpec(module.in_features, module.out_features, (1, 1), bias=False)
    assert isinstance(module, nn.Conv2d)
    return ConvSpec.of(module).change(bias=False)


def prepared(reference: nn.Module, steps: Sequence[Operation], data: Data) -> nn.Module:
    """Copy the original, sharing its parameters where they stay, as the convs were when they were converted.

    What the plans of these steps baked is baked, channels are in the order that they gave them, and functional
    convolutions that they swapped are modules.
    """
    made = shadow(reference)
    for step in steps:
        if step.plan is None:
            continue
        plan, inputs = Plan.model_validate(step.plan), next(iter(data)).inputs.batched(2)
        bake_(made, plan.baked)
        made = in_order_of(made, [step], inputs)
        if lifts := {entry.path for entry in plan.swaps if entry.functional is not None}:
            network = Network(made, inputs)
            found = [site.functional for site in sites.survey(network).sites if site.path in lifts]
            pairs = [(one, functional.conv_of(made, one)) for one in found if one is not None]
            functional.lift_(made, pairs, network.islands)
    return in_mode(made, False)


def units(
    converted: nn.Module, reference: nn.Module, inputs: Inputs, *, refit: bool, survey: Survey | None = None
) -> list[Unit]:
    """List what is fitted, in the order of execution; `inputs` is one small call. With `refit`, also what is behind.

    `survey` is that of the reference, where it is known.

    Raises:
        FitError: a block has no original in the reference, or no block can be fitted.
    """
    survey = survey or sites.survey(Network(reference, inputs))
    known = {path: site for site in survey.sites for path in site.paths}
    blocks = {path: m for path, m in converted.named_modules() if isinstance(m, Fittable)}
    if not blocks:
        raise FitError(
            "the network has no block that can be fitted: ACBlocks compute what their convs did",
            todo="Convert it with a recipe for HetConv or OctaveConv.",
        )
    found = [_of_block(path, block, converted, reference, known.get(path)) for path, block in blocks.items()]
    if refit:
        found += _behind(converted, reference, known)
    return _in_order(found, converted, reference, inputs)


def unit_of(path: str, block: Block, converted: nn.Module, reference: nn.Module, survey: Survey) -> Unit:
    """Pair one block, which need not be in the network yet, with the conv that it would stand for."""
    site = next((site for site in survey.sites if path in site.paths), None)
    return _of_block(path, block, converted, reference, site)


def _of_block(path: str, block: Block, converted: nn.Module, reference: nn.Module, site: Site | None) -> Unit:
    """Pair a block with the conv that it stands for."""
    try:
        original = reference.get_submodule(path)
    except AttributeError:
        original = None
    if not isinstance(original, nn.Conv2d) or tuple(original.weight.shape) != block.spec.weight_shape:
        raise FitError(f"the reference has no conv at {path} that this block could stand for", todo=_ORIGINAL)
    return _with_norm(path, block, original, converted, reference, site)


def _with_norm(
    path: str, made: nn.Module, original: nn.Module, converted: nn.Module, reference: nn.Module, site: Site | None
) -> Unit:
    """Find the norm behind both, where one belongs to them alone."""
    if site is None or not site.norm:
        return Unit(path, made, original)
    behind, before = converted.get_submodule(site.norm[0]), reference.get_submodule(site.norm[0])
    if not all(isinstance(getattr(one, "running_mean", None), Tensor) for one in (behind, before)):
        return Unit(path, made, original)
    return Unit(path, made, original, behind, before)


def _behind(converted: nn.Module, reference: nn.Module, known: dict[str, Site]) -> Iterator[Unit]:
    """Give the convs and linear layers that were not converted and belong to nobody else."""
    inside = {part for block in converted.modules() if isinstance(block, Block) for part in block.modules()}
    originals = dict(reference.named_modules())
    owners = [id(p) for m in converted.modules() for p in m.parameters(recurse=False)]
    for path, made in converted.named_modules():
        original, site = originals.get(path), known.get(path)
        if made in inside or not isinstance(made, nn.Conv2d | nn.Linear) or original is None:
            continue
        if type(made) not in (nn.Conv2d, nn.Linear) or type(original) is not type(made):
            continue
        if any(owners.count(id(p)) > 1 for p in made.parameters()) or made._forward_pre_hooks or made._forward_hooks:
            continue
        if isinstance(made, nn.Linear):
            yield Unit(path, made, original)
        elif site is not None and site.obstacle is None:
            yield _with_norm(path, made, original, converted, reference, site)


def _in_order(found: Sequence[Unit], converted: nn.Module, reference: nn.Module, inputs: Inputs) -> list[Unit]:
    """Sort units by their first call; leave out those that see what their originals see, or are never called."""
    seen: dict[Unit, list[Any]] = {}
    before: dict[Unit, list[Any]] = {}

    def note(store: dict[Unit, list[Any]]) -> Callable[[Unit, Sequence[Any], Any], None]:
        return lambda unit, args, _: store.setdefault(unit, []).append(copied(args))

    watched(converted, [(unit, unit.made) for unit in found], inputs, note(seen))
    watched(reference, [(unit, unit.original) for unit in found], inputs, note(before))
    return [
        replace(unit, calls=len(calls))
        for unit, calls in seen.items()
        if unit.is_block or _has_changed(unit, calls, before.get(unit, []))
    ]


def _has_changed(unit: Unit, calls: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether a unit that was not converted sees something else than it did."""
    if len(calls) != len(before) or not all(map(unit.is_called_with, [*calls, *before])):
        return False
    return not all(torch.equal(now[0], then[0]) for now, then in zip(calls, before, strict=True))
