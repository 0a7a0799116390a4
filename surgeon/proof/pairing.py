"""Which modules of two models are compared with each other: those that both have under the same name.

Names are walked down from the roots; a wrapper around one of the models is looked through. A module without submodules,
a conv and a block are compared as they are. Of a Sequential in which modules were left out, and the numbers of the
others have changed, those that are left are compared in order. Any other module whose submodules have other names in B
(because somebody folded them into one) is compared as a whole, and the submodules that both have are compared, too.
A module that one model has and the other replaced by an Identity, or left out, was merged into a neighbour: both are
compared at the end of that stretch. So is a norm of which the other model has left only what its class adds to a norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from surgeon._torch_compat import NormBase
from surgeon.analysis.run import is_conv
from surgeon.blocks import Operator, norms
from surgeon.models.copies import kind_of
from surgeon.models.copies import names as names_of


@dataclass(slots=True)
class Pairing:
    """Names of A's modules that are compared, in the order in which A registers them.

    `there`: their names in B. `moved`: those that are missing or an Identity in one of the models. `only_b`: B's names
    of modules that A lacks. `wholes`: those whose submodules have other names in B. `inner`: those that lie in a whole.
    """

    paths: list[str] = field(default_factory=list)
    there: dict[str, str] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    wholes: list[str] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)


def pair(a: nn.Module, b: nn.Module) -> Pairing:
    """Pair the modules of two models; modules that one model shares and the other does not are left out."""
    found = Pairing()
    _walk(("", ""), a, b, found, is_inner=False)
    first = {path for path, _ in a.named_modules()}  # each module once, under its first name
    mine, other = _shared(a), _shared(b)
    found.paths = [
        path
        for path in found.paths
        if path in first and {found.there.get(one, one) for one in mine[path]} == set(other[found.there[path]])
    ]
    found.moved = [path for path in found.moved if path in first]
    return found


def pair_below(a: nn.Module, b: nn.Module, paths: tuple[str, str]) -> Pairing:
    """Pair a module of A with one of B, whatever their names, and the modules in them by name."""
    found = Pairing()
    _walk(paths, a.get_submodule(paths[0]), b.get_submodule(paths[1]), found, is_inner=False)
    return found


def sites(a: nn.Module, b: nn.Module) -> Pairing:
    """Pair convs and blocks alone, and the norms that one of the two models has inside its blocks."""
    others = dict(b.named_modules(remove_duplicate=False))
    both = [(path, module, others[path]) for path, module in a.named_modules() if path in others]
    return Pairing(
        [path for path, one, other in both if is_site(one) and is_site(other)],
        {path: path for path, _, _ in both},
        [path for path, one, other in both if _is_moved(one, other) and (_is_norm(one) or _is_norm(other))],
    )


def unwrapped(model: nn.Module, other: nn.Module) -> nn.Module:
    """Look through modules that hold nothing but one other, if that has the names that the other model has.

    >>> net = nn.Sequential(nn.ReLU(), nn.ReLU())
    >>> unwrapped(nn.ModuleDict({"module": net}), net) is net
    True
    """
    wanted, inner = dict(other.named_children()).keys(), model
    while not wanted <= dict(inner.named_children()).keys():
        children = list(inner.children())
        if len(children) != 1:
            return model
        inner = children[0]
    return inner


def is_site(module: nn.Module) -> bool:
    """Whether a module is a conv, a block, or what a block is deployed as."""
    return is_conv(module) or isinstance(module, Operator)


def _walk(path: tuple[str, str], a: nn.Module, b: nn.Module, found: Pairing, *, is_inner: bool) -> None:
    here, there = path
    found.there[here] = there
    if here and _is_moved(a, b):
        found.moved.append(here)
        return
    is_callable = bool(here) and _can_be_called(a) and _can_be_called(b)
    if here and (_is_leaf(a) or _is_leaf(b)):
        _add(here, found, is_inner=is_inner, is_callable=is_callable)
        return
    ours, theirs = dict(a.named_children()), dict(b.named_children())
    pairs = [(name, name) for name in ours if name in theirs]
    alone = [[name for name in one if name not in other] for one, other in ((ours, theirs), (theirs, ours))]
    is_whole = False
    if any(alone) and isinstance(a, nn.Sequential) and (aligned := _aligned(ours, theirs)) is not None:
        pairs, alone = aligned
    folded = [
        [name for name in names if _can_be_left_out(side[name])]
        for side, names in zip((ours, theirs), alone, strict=True)
    ]
    if folded != alone:
        is_whole = is_callable
        found.wholes += [here] if is_callable else []
        _add(here, found, is_inner=is_inner, is_callable=is_callable)
    if not is_whole:
        found.moved += [_join(here, name) for name in folded[0]]
        found.only_b += [_join(there, name) for name in folded[1]]
    for one, other in pairs:
        inner = is_inner or is_whole
        _walk((_join(here, one), _join(there, other)), ours[one], theirs[other], found, is_inner=inner)


def _add(path: str, found: Pairing, *, is_inner: bool, is_callable: bool) -> None:
    if is_callable:
        found.paths.append(path)
        found.inner |= {path} if is_inner else set()


def _aligned(
    ours: dict[str, nn.Module], theirs: dict[str, nn.Module]
) -> tuple[list[tuple[str, str]], list[list[str]]] | None:
    """Pair the modules of two Sequentials in order, and say which are left over; None if they do not follow.

    Of two that are not alike, the one that folding takes away is left over: a norm or an Identity.
    """
    pairs: list[tuple[str, str]] = []
    alone: list[list[str]] = [[], []]
    left, right = list(ours), list(theirs)
    while left or right:
        if left and right and _are_alike(ours[left[0]], theirs[right[0]]):
            pairs.append((left.pop(0), right.pop(0)))
        elif left and _can_be_left_out(ours[left[0]]):
            alone[0].append(left.pop(0))
        elif right and _can_be_left_out(theirs[right[0]]):
            alone[1].append(right.pop(0))
        else:
            return None
    return pairs, alone


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    return kind_of(one) is kind_of(other) or (is_site(one) and is_site(other))


def _shared(model: nn.Module) -> dict[str, Sequence[str]]:
    """Give all names of the module that has this name."""
    return {name: names for names in names_of(model).values() for name in names}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_leaf(module: nn.Module) -> bool:
    return is_site(module) or not any(True for _ in module.children())


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module computes something; below a GraphModule some only hold others."""
    return type(module) is not nn.Module and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_moved(one: nn.Module, other: nn.Module) -> bool:
    """Whether one of the two does nothing and the other something, or one is what is left of the other, a norm."""
    is_one_idle = (type(one) is nn.Identity) is not (type(other) is nn.Identity)
    return is_one_idle or _is_rest(one, other) or _is_rest(other, one)


def _is_rest(one: nn.Module, norm: nn.Module) -> bool:
    """Whether a module runs what is left of a norm of this class once a conv before it has taken in what normalises."""
    names = norms.rest_of(norm)
    is_ours = isinstance(one, norms.HasRest) and not norms.is_batch_norm(one)
    is_row = is_ours or (type(one) is nn.Sequential and tuple(one._modules) == names)
    return is_row and norms.leaves_rest(norm)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NormBase) or norms.is_batch_norm(module)


def _can_be_left_out(module: nn.Module) -> bool:
    """Whether folding takes a module of this kind away without renaming anything."""
    return isinstance(module, nn.Identity) or _is_norm(module)


def is_below(path: str, others: Iterable[str]) -> bool:
    """Whether a module lies in one of others, or is one of them."""
    return any(path == other or path.startswith(f"{other}.") for other in others)
