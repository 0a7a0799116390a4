"""Which blocks become the conv and the norm again that they were made of, and where that norm goes.

A block that has taken over a norm leaves an Identity in its place. Folded to one conv it is faster, but its weights do
not fit into the class that the user has. `fuse` with `keep_norms` undoes the swap for every block, and without being
asked for those inside a module that folds itself: its own folding reads the conv and the norm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from surgeon.analysis import convs
from surgeon.analysis.network import Network
from surgeon.analysis.obstacles import custom_call
from surgeon.analysis.self_folding import SelfFolding, SelfFoldings
from surgeon.analysis.sites import Site
from surgeon.blocks import Block, Foldable, contract
from surgeon.blocks.norms import NormRest, restore
from surgeon.errors import PlanError
from surgeon.surgery.finite import finite
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Entry, Plan

_NO_HISTORY = "Fuse what `convert` made, with the history that it carries, or fuse without keeping norms."
_UNDO = "Put an nn.Identity back there, or fuse without keeping norms."

Paths = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Return:
    """What a block was made of: all names of the norm that it took over, if any, and whether its conv had a bias."""

    norm: Paths
    bias: bool
    numbers: int | None = None  # how many parameters the norm had, where the plan tells
    functional: bool = False  # the conv was a function call, and its parameters were the module's around it


def refusal(site: Site, block: type[Block], *, takes_norm: bool, leaves_norm: bool = False) -> str | None:
    """Say why a conv cannot be swapped in a module that folds itself."""
    if (around := site.folds_itself) is None or (leaves_norm and site.functional is None):
        return None
    if block.gives_norm_back and site.functional is None:
        if takes_norm or (site.spec is not None and site.spec.bias):
            return None
        why = f"leaves out what the norms in the block add ({site.norm_obstacle or 'no norm is taken over'})"
    else:
        why = f"reads the kernel of this conv, which `{block.name}` does not keep"
    return f"{around}, and its folding {why}; fold it first: {around.how}"


def returns(
    network: Network, steps: Sequence[Operation], *, everywhere: bool, dense: bool = False
) -> dict[Paths, Return]:
    """List the blocks that become a conv and a norm again: all of them, or those in modules that fold themselves.

    Blocks that cost less than their conv are among them if they are to be folded too, as `dense` says.

    Raises:
        PlanError: it is not known what a block was made of, or something else stands where its norm has to go.
    """
    origins, around = _origins(steps), SelfFoldings(network.model)
    found = {}
    for paths in _blocks(network, dense=dense):
        origin = next((origins[path] for path in paths if path in origins), None)
        if origin is None and everywhere:
            raise PlanError(
                f"{paths[0] or 'the model'} cannot become a conv and a norm again: the model has no history that says "
                "what this block was made of",
                todo=_NO_HISTORY,
            )
        if origin is not None and (everywhere or around.around(paths) is not None):
            found[paths] = origin
    return _checked(network, found)


def recorded(network: Network, steps: Sequence[Operation], step: Operation) -> dict[Paths, Return]:
    """List the same for an operation that was done before: what it names, whatever would be chosen today."""
    if step.keep_norms:
        return returns(network, steps, everywhere=True, dense=step.dense)
    origins = _origins(steps) if step.returned else {}
    if lost := [path for path in step.returned if path not in origins]:
        raise PlanError(f"the history gives back the norm of {lost[0]}, which no plan in it swaps", todo=_NO_HISTORY)
    found = {paths: origins[paths[0]] for paths in _blocks(network, dense=step.dense) if paths[0] in step.returned}
    return _checked(network, found)


def make(paths: Paths, block: Foldable, origin: Return, rest: nn.Module | None) -> dict[Paths, nn.Module]:
    """Make the conv that a block becomes again, and the norm if it has taken one over, by their names.

    `rest` is what stands in the norm's place: what its class does besides goes on doing that.

    A bias in front of a norm does nothing that the running mean does not do, and was moved there: it comes back as 0.

    Raises:
        PlanError: the block cannot be folded into a conv and a norm, or a dtype does not hold the numbers.
    """
    if not origin.norm:
        alone = finite(paths[0], "folded", partial(_alone, block, origin), block)
        return {paths: convs.again(block.origin, alone)}
    made = finite(paths[0], "folded into a conv and a norm", partial(_pair, block), block)
    if made is None:
        raise PlanError(
            f"{paths[0]} cannot become a conv and a norm again: a block called {block.name} has no norm to give back",
            todo="Fuse without keeping norms.",
        )
    conv, norm = made
    assert isinstance(conv, nn.Conv2d)
    if origin.bias:
        weight = conv.weight
        conv.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad)
    conv = convs.again(block.origin, conv)
    return {paths: conv, origin.norm: _whole(paths[0], norm, rest)}


def _whole(path: str, norm: nn.Module, rest: nn.Module | None) -> nn.Module:
    """Put a norm together with what its class does besides."""
    if not isinstance(rest, NormRest):
        return norm
    try:
        return restore(rest, norm)
    except (ImportError, TypeError) as error:
        raise PlanError(
            f"{path} cannot give back the norm that it took over, a {rest.origin}: {error}",
            todo="Fuse without keeping norms.",
        ) from error


def _alone(block: Foldable, origin: Return) -> nn.Conv2d:
    """Make one conv; it has a bias where the block adds something, even if the conv before it had none."""
    conv = contract.fold(block)
    adds = conv.bias is not None and not conv.bias.is_meta and bool(conv.bias.any())
    if not origin.bias and not adds:
        conv.register_parameter("bias", None)
    return conv


def _pair(block: Foldable) -> nn.ModuleList | None:
    made = contract.fold_keeping_norm(block)
    return None if made is None else nn.ModuleList(made)


def unfit(model: nn.Module, returned: Mapping[Paths, Return]) -> str | None:
    """Say that the keys of some convs and norms are not what they were before the swap; None if all are."""
    wrong = []
    for paths, one in returned.items():
        conv = model.get_submodule(paths[0])
        if one.functional or (not one.bias and getattr(conv, "bias", None) is not None):
            wrong.append(paths[0])
        if one.norm and one.numbers == 0 and [*model.get_submodule(one.norm[0]).parameters(recurse=False)]:
            wrong.append(one.norm[0])
    if not wrong:
        return None
    named = ", ".join(wrong[:3]) + f" and {len(wrong) - 3} more" * (len(wrong) > 3)
    what = "has a key" if len(wrong) == 1 else "have keys"
    return f"{named} {what} that the network did not have before it was converted: the weights do not load strictly"


def given_back(model: nn.Module, steps: Sequence[Operation]) -> list[nn.Module]:
    """List the convs and norms that blocks have become again, where they still stand."""
    origins, held = _origins(steps), dict(model.named_modules(remove_duplicate=False))
    chosen = [origins if step.keep_norms else step.returned for step in steps if step.operation == "fuse"]
    names = [name for some in chosen for path in some if path in origins for name in (path, *origins[path].norm)]
    return [held[name] for name in names if name in held]


def to_call_next(network: Network, returned: Collection[Paths]) -> dict[SelfFolding, int]:
    """Give one module of each kind that folds itself and holds such blocks, and how many more of this kind do."""
    foldings = SelfFoldings(network.model)
    found = dict.fromkeys(one for paths in returned if (one := foldings.around(paths)) is not None)
    kinds = Counter((one.kind, one.method) for one in found)
    first = {(one.kind, one.method): one for one in reversed(found)}
    return {one: kinds[kind] - 1 for kind, one in reversed(first.items())}


def misread(network: Network, returned: Mapping[Paths, Return]) -> dict[str, SelfFolding]:
    """List the blocks that stay in a module which folds itself, and that it would read wrongly."""
    foldings = SelfFoldings(network.model)
    blocks = [paths for module, paths in network.names.items() if isinstance(module, Block) and paths not in returned]
    return {paths[0]: one for paths in blocks if (one := foldings.around(paths)) is not None}


def _blocks(network: Network, *, dense: bool) -> list[Paths]:
    held = network.names.items()
    return [paths for module, paths in held if isinstance(module, Foldable) and (dense or module.folds_for_free)]


def _origins(steps: Sequence[Operation]) -> dict[str, Return]:
    """Read from the plans that were carried out what every block was made of; the last one counts."""
    plans = [Plan.model_validate(step.plan) for step in steps if step.plan is not None]
    return {path: _origin(entry) for plan in plans for entry in plan.swaps for path in entry.paths}


def _origin(entry: Entry) -> Return:
    words = entry.spec.split(", ") if isinstance(entry.spec, str) else ()  # as plans of format 1 describe a conv
    bias = "no bias" not in words if isinstance(entry.spec, str) else entry.spec.bias
    own = None if isinstance(entry.spec, str) else math.prod(entry.spec.weight_shape) + entry.spec.c_out * bias
    numbers = None if own is None or entry.params is None else entry.params.before - own
    return Return(entry.takes_norm, bias, numbers, functional=entry.functional is not None)


def _checked(network: Network, found: dict[Paths, Return]) -> dict[Paths, Return]:
    """Make sure that every norm can go back to where it was."""
    held = dict(network.model.named_modules(remove_duplicate=False))
    for paths, one in found.items():
        for path in one.norm:
            if (why := _occupied(held.get(path), path)) is not None:
                raise PlanError(f"{paths[0]} cannot give back the norm that it took over: {why}", todo=_UNDO)
    return found


def _occupied(module: nn.Module | None, path: str) -> str | None:
    if module is None:
        return f"there is no module {path} any more"
    if type(module) not in (nn.Identity, NormRest):
        return f"{path} is a {type(module).__name__} now"
    return custom_call(module, path)
