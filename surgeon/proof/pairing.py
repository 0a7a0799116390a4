"""Which modules of two models are compared with each other: those that both have under the same name.

Names are walked down from the roots. A module without submodules, a conv and a block are compared as they are. A module
whose submodules have other names in B (because somebody folded them into one) is compared as a whole, and the
submodules that both have are compared, too. A module that one model has and the other replaced by an Identity, or left
out, was merged into a neighbour: both are compared at the end of that stretch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from surgeon._torch_compat import NormBase
from surgeon.analysis.run import is_conv
from surgeon.blocks import Operator


@dataclass(slots=True)
class Pairing:
    """Names of modules that are compared, in the order in which A registers them.

    `moved`: those that are missing or an Identity in one of the models. `wholes`: those whose submodules have other
    names in B. `inner`: those that lie in a whole.
    """

    paths: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    wholes: list[str] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)


def pair(a: nn.Module, b: nn.Module) -> Pairing:
    """Pair the modules of two models by their names."""
    found = Pairing()
    others = dict(b.named_modules(remove_duplicate=False))
    names = {path for path, _ in a.named_modules()}  # each module once, under its first name
    known = {path: module for path, module in a.named_modules() if path in others}
    _walk("", a, b, found, is_inner=False)
    only_b = [path for path, module in b.named_modules() if path not in names and _can_be_left_out(module)]
    only_a = [path for path, module in a.named_modules() if path not in others and _can_be_left_out(module)]
    found.paths = [path for path in found.paths if path in known]
    found.moved += [path for path in (*only_a, *only_b) if not _is_below(path, found.paths)]
    return found


def sites(a: nn.Module, b: nn.Module) -> Pairing:
    """Pair convs and blocks alone, and the norms that one of the two models has inside its blocks."""
    others = dict(b.named_modules(remove_duplicate=False))
    both = [(path, module, others[path]) for path, module in a.named_modules() if path in others]
    return Pairing(
        [path for path, one, other in both if is_site(one) and is_site(other)],
        [path for path, one, other in both if _is_moved(one, other) and isinstance(_other(one, other), NormBase)],
    )


def is_site(module: nn.Module) -> bool:
    """Whether a module is a conv, a block, or what a block is deployed as."""
    return is_conv(module) or isinstance(module, Operator)


def _walk(path: str, a: nn.Module, b: nn.Module, found: Pairing, *, is_inner: bool) -> None:
    if path and _is_moved(a, b):
        found.moved.append(path)
        return
    if path and (_is_leaf(a) or _is_leaf(b)):
        if _can_be_called(a) and _can_be_called(b):
            found.paths.append(path)
            found.inner |= {path} if is_inner else set()
        return
    ours, theirs = dict(a.named_children()), dict(b.named_children())
    alone = [module for name, module in (*ours.items(), *theirs.items()) if name not in ours.keys() & theirs.keys()]
    is_whole = bool(path) and not all(map(_can_be_left_out, alone)) and _can_be_called(a) and _can_be_called(b)
    if is_whole:
        found.paths.append(path)
        found.wholes.append(path)
        found.inner |= {path} if is_inner else set()
    for name, module in ours.items():
        if name in theirs:
            _walk(f"{path}.{name}".lstrip("."), module, theirs[name], found, is_inner=is_inner or is_whole)


def _is_below(path: str, others: Iterable[str]) -> bool:
    """Whether a module lies in one that is compared as it is, or as a whole."""
    return any(path.startswith(f"{other}.") for other in others)


def _is_leaf(module: nn.Module) -> bool:
    return is_site(module) or not any(True for _ in module.children())


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module computes something; below a GraphModule some only hold others."""
    return type(module) is not nn.Module and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_moved(one: nn.Module, other: nn.Module) -> bool:
    """Whether one of the two is an Identity, and the other does something."""
    return (type(one) is nn.Identity) is not (type(other) is nn.Identity)


def _other(one: nn.Module, other: nn.Module) -> nn.Module:
    return other if type(one) is nn.Identity else one


def _can_be_left_out(module: nn.Module) -> bool:
    """Whether folding takes a module of this kind away without renaming anything."""
    return isinstance(module, NormBase | nn.Identity)
