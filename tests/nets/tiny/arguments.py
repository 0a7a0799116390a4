"""What a network takes, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tiny.basic import ConvNorm


class TakesArguments(ConvNorm):
    """Takes any number of maps."""

    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(maps[0]) * maps[1]


class TakesKeywords(ConvNorm):
    """Takes any keywords."""

    def forward(self, x: Tensor, **options: float) -> Tensor:
        return super().forward(x) * options.get("scale", 1.0)


class TakesAKeywordOnly(ConvNorm):
    """Takes an optional map that can be given by name alone."""

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) if scale is None else super().forward(x) * scale


class TakesTwo(ConvNorm):
    """Takes two maps."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) * y


class TakesAList(ConvNorm):
    """Takes two maps in a list."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return super().forward(maps[0]) * maps[1]


class TakesADict(ConvNorm):
    """Takes two maps in a dict."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().forward(batch["image"]) * batch["scale"]


class ReturnsADict(ConvNorm):
    """Returns a map and, in a list, its input."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"out": super().forward(x), "inputs": [x]}


class ReturnsATuple(ConvNorm):
    """Returns a map, a number and nothing, nested."""

    def forward(self, x: Tensor) -> tuple[object, ...]:
        y = super().forward(x)
        return y, (y.mean(), None)


@dataclass
class Result:
    """What ReturnsADataclass returns."""

    out: Tensor
    note: str = ""


class ReturnsADataclass(ConvNorm):
    """Returns an object that holds a map."""

    def forward(self, x: Tensor) -> Result:
        return Result(super().forward(x))


class ReturnsListsOfDifferentLength(ConvNorm):
    """One more while it trains, as networks with auxiliary heads do."""

    def forward(self, x: Tensor) -> list[Tensor]:
        y = super().forward(x)
        return [y, y.mean((2, 3))] if self.training else [y]
