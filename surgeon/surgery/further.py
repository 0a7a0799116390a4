"""What `fuse` folds besides surgeon's own blocks: what is asked for, what was done, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from surgeon.conv import numbers


@dataclass(frozen=True, slots=True)
class FoldedBranches:
    """A sub-graph that is one conv now: its name, the module whose graph it was in, and what it was made of."""

    path: str
    within: str
    convs: int
    norms: int
    others: int  # sums, identities, scales, pools …

    @property
    def has_branches(self) -> bool:
        """Whether it was more than one conv with its norms."""
        return self.convs > 1 or self.others > 0

    def __str__(self) -> str:
        parts = [(self.convs, "conv"), (self.norms, "norm"), (self.others, "other step")]
        made_of = ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in parts if count)
        return f"{self.path} ({made_of})"


@dataclass(slots=True)
class Done:
    """What was folded, by the name of the conv, and where what looks like branches was not, with the reason."""

    folded: dict[str, FoldedBranches] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)  # that were folded into the conv before them
    modules: list[str] = field(default_factory=list)  # in whose graphs something was folded, in this order
    dtypes: dict[nn.Module, torch.dtype] = field(default_factory=dict)  # of folded layers, which are float64 meanwhile

    def __bool__(self) -> bool:
        return bool(self.folded or self.norms)

    def round_(self, model: nn.Module) -> None:
        """Cast every folded layer once to the dtype that it is to have; one may have become a part of another."""
        for layer in model.modules():
            if (dtype := self.dtypes.pop(layer, None)) is not None:
                for name, tensor in layer.named_parameters():
                    rounded = nn.Parameter(numbers.cast(tensor.detach(), dtype, name), tensor.requires_grad)
                    layer.register_parameter(name, rounded)

    def add_(self, made: FoldedBranches, convs: Sequence[str]) -> None:
        """Note what was folded; of `convs`, those that were folded themselves before are a part of it."""
        parts = [made, *(self.folded.pop(path) for path in convs if path in self.folded)]
        counts = {name: sum(getattr(one, name) for one in parts) for name in ("convs", "norms", "others")}
        counts["convs"] -= len(parts) - 1
        self.folded[made.path] = replace(made, **counts)
        if made.within not in self.modules:
            self.modules.append(made.within)


class Recorded(NamedTuple):
    """Which norms were folded, and in the graphs of which modules something was, as a history says."""

    norms: Collection[str]
    modules: Collection[str]


@dataclass(frozen=True, slots=True)
class Further:
    """What is folded besides surgeon's own blocks.

    `branches`: linear sub-graphs with more than one conv, or a sum; and norms in modules that fold themselves. `norms`:
    every norm that belongs to one conv alone. `costlier`: sub-graphs that take more multiply-adds as one conv, too.
    """

    branches: bool = False
    norms: bool = False
    costlier: bool = False

    def __bool__(self) -> bool:
        return self.branches or self.norms
