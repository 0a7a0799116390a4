"""Which modules of two models belong together where their names differ.

    given by the user     a.b=c.d: that module of A and that of B, and what lies in them, by name
    by their tensors      the same kind, geometry and numbers; of several that are alike, in order
    by their place        between two that were matched, a row of modules of the same kinds and geometry in both

What has the same name in both was paired before, by `pairing`. Order is that in which modules are registered, which is
the order of execution in nearly all networks. By their place modules are matched only where at least half of all were
matched in a surer way: they are the few that were changed.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis.run import is_conv
from surgeon.blocks import norms
from surgeon.conv.spec import ConvSpec
from surgeon.errors import VerifyError
from surgeon.models.copies import kind_of
from surgeon.proof import pairing
from surgeon.proof.distance import dense
from surgeon.proof.pairing import Pairing, is_below

Pairs = Sequence[tuple[str, str]]


@dataclass(slots=True)
class Matched:
    """How modules of other names were matched: A's name → B's."""

    given: dict[str, str] = field(default_factory=dict)
    by_tensors: dict[str, str] = field(default_factory=dict)
    by_place: dict[str, str] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)  # modules of A with weights that have no counterpart

    def says(self) -> Iterator[str]:
        """Say in sentences how modules were matched, and which were not."""
        ways = (("as given", self.given), ("by their tensors", self.by_tensors), ("by their place", self.by_place))
        found = [f"{len(pairs)} {words}" for words, pairs in ways if pairs]
        if found:
            yield f"modules with other names in B were matched: {', '.join(found)}"
        if self.alone and found:
            named = ", ".join(self.alone[:3]) + ", …" * (len(self.alone) > 3)
            verb = "module of A with weights has" if len(self.alone) == 1 else "modules of A with weights have"
            yield f"{len(self.alone)} {verb} no counterpart in B: {named}"


def pairs_in(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Read pairs of names as `--map` takes them.

    >>> pairs_in(["features.0=stem"])
    [('features.0', 'stem')]

    Raises:
        VerifyError: one of them is no pair, or two begin with the same name.
    """
    found: list[tuple[str, str]] = []
    for text in texts:
        one, is_pair, other = text.partition("=")
        if not (is_pair and one.strip() and other.strip()) or "=" in other:
            raise VerifyError(
                f"--map {text} is not a pair of names", todo="Write A's name, =, and B's: --map features.0=stem."
            )
        if one.strip() in dict(found):
            raise VerifyError(f"--map names {one.strip()} of A twice", todo="Give every module one counterpart.")
        found.append((one.strip(), other.strip()))
    return found


def matched(a: nn.Module, b: nn.Module, named: Pairs = ()) -> tuple[Pairing, Matched]:
    """Pair the modules of two models by name, as they are given, and by what they hold.

    Raises:
        VerifyError: a name that was given is not in its model, or is given twice.
    """
    found, how = pairing.pair(a, b), Matched()
    check_names(a, b, named)
    for one, other in named:
        _give(a, b, (one, other), found, how)
    ours, theirs = (_holders(model) for model in (a, b))
    idle = {path for path in found.moved if path in found.there}  # B has an Identity of that name
    taken = {found.there.get(path, path) for path in (*found.paths, *idle)}
    left_a = [path for path in ours if path not in found.paths and path not in idle]
    left_b = [path for path in theirs if path not in taken]
    if left_a and left_b:
        _by_tensors(ours, theirs, (left_a, left_b), how)
        sure = len(how.by_tensors) + len(ours) - len(left_a)
        if 2 * sure >= len(ours):
            _by_place(ours, theirs, (left_a, left_b), how)
        new = how.by_tensors | how.by_place
        _add(a, b, new, found)
        left_a = [path for path in left_a if path not in new]
    how.alone = [path for path in left_a if not is_below(path, [*found.paths, *found.moved])]
    return found, how


def check_names(a: nn.Module, b: nn.Module, named: Pairs) -> None:
    """Make sure that each model has the modules that were given, and each of them once.

    Raises:
        VerifyError: a name is not in its model, or is given twice.
    """
    for side, model, paths in (("A", a, [one for one, _ in named]), ("B", b, [other for _, other in named])):
        known = [path for path, _ in model.named_modules(remove_duplicate=False)]
        for path in paths:
            if path not in known:
                near = difflib.get_close_matches(path, known, 1, 0.5) or known[1:2]
                raise VerifyError(
                    f"{side} has no module {path}", todo=f"Did you mean {near[0]}?" if near else "Check the name."
                )
            if paths.count(path) > 1:
                raise VerifyError(f"{path} of {side} is given twice", todo="Give every module one counterpart.")


def _give(a: nn.Module, b: nn.Module, pair: tuple[str, str], found: Pairing, how: Matched) -> None:
    """Pair two modules that the user named, and those in them, in place of what their names say."""
    one, other = pair
    inside = pairing.pair_below(a, b, pair)
    gone = {path for path in found.paths if is_below(path, [one]) or is_below(found.there[path], [other])}
    found.paths = [path for path in found.paths if path not in gone] + inside.paths
    found.moved = [path for path in found.moved if not is_below(path, [one])] + inside.moved
    found.only_b = [path for path in found.only_b if not is_below(path, [other])] + inside.only_b
    found.wholes = [path for path in found.wholes if path not in gone] + inside.wholes
    found.inner = (found.inner - gone) | inside.inner
    found.there |= inside.there
    how.given[one] = other


def _by_tensors(
    ours: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    left: tuple[Sequence[str], Sequence[str]],
    how: Matched,
) -> None:
    groups: list[dict[Any, list[str]]] = [defaultdict(list), defaultdict(list)]
    for group, modules, paths in zip(groups, (ours, theirs), left, strict=True):
        for path in paths:
            group[_kind(modules[path]), _hash(modules[path])].append(path)
    for key, paths in groups[0].items():
        if len(paths) == len(groups[1].get(key, [])):
            how.by_tensors.update(zip(paths, groups[1][key], strict=True))


def _by_place(
    ours: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    left: tuple[Sequence[str], Sequence[str]],
    how: Matched,
) -> None:
    """Match rows of modules of the same kinds that lie between two that are matched."""
    rows = [[[]], [[]]]  # type: list[list[list[str]]]
    anchors = [list(how.by_tensors), list(how.by_tensors.values())]
    order = [[path for path in side if path in known] for side, known in zip(left, map(set, anchors), strict=True)]
    if [how.by_tensors[path] for path in order[0]] != order[1]:  # in another order in B
        return
    for row, side, known in zip(rows, left, map(set, anchors), strict=True):
        for path in side:
            if path in known:
                row.append([])
            else:
                row[-1].append(path)
    for one, other in zip(*rows, strict=True):
        if [_kind(ours[path]) for path in one] == [_kind(theirs[path]) for path in other]:
            how.by_place.update(zip(one, other, strict=True))


def _add(a: nn.Module, b: nn.Module, new: Mapping[str, str], found: Pairing) -> None:
    """Pair what was matched; an activation that only one of the two has in its norms belongs to the norm before it."""
    wholes = found.wholes
    found.moved = [path for path in found.moved if path not in new]
    found.paths += new
    found.there.update(new)
    found.only_b = [path for path in found.only_b if path not in new.values()]
    found.inner |= {path for path in new if is_below(path, wholes)}
    known = {*found.paths, *found.moved}
    for one, other in new.items():
        sides = a.get_submodule(one), b.get_submodule(other)
        if _acts(sides[1]) and not _acts(sides[0]) and (path := _activation_behind(a, one, known)):
            found.moved.append(path)
        if _acts(sides[0]) and not _acts(sides[1]) and (path := _activation_behind(b, other, {*found.there.values()})):
            found.only_b.append(path)


def _activation_behind(model: nn.Module, norm: str, known: Collection[str]) -> str | None:
    """Name the activation that is registered right behind a norm, unless it has a counterpart of its own."""
    leaves = [path for path, module in model.named_modules() if not any(True for _ in module.children())]
    after = leaves[leaves.index(norm) + 1 :][:1] if norm in leaves else []
    is_one = bool(after) and type(model.get_submodule(after[0])).__module__ == "torch.nn.modules.activation"
    return after[0] if is_one and not is_below(after[0], known) else None


def _holders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold weights and no further modules that do, in the order in which they are registered."""
    return {
        path: module
        for path, module in model.named_modules()
        if path
        and any(True for _ in module.parameters(recurse=False))
        and not any(True for child in module.children() for _ in child.parameters())
    }


def _kind(module: nn.Module) -> Any:
    """What two modules must have in common to be matched: what they are, and their geometry."""
    if is_conv(module) and isinstance(module, nn.Conv2d):
        return "conv", ConvSpec.of(module)
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters(recurse=False))
    return ("norm" if norms.is_batch_norm(module) else kind_of(module), shapes)


def _hash(module: nn.Module) -> str:
    """A hash of the numbers of a module, without counters."""
    found = hashlib.sha256()
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked"):
            found.update(f"{name} {tensor.dtype} ".encode())
            found.update(dense(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _acts(module: nn.Module) -> bool:
    """Whether a norm has an activation in it."""
    return norms.is_batch_norm(module) and any(type(one) is not nn.Identity for one in module.children())
