"""Modules that have two names, or none that torch knows."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F

from tiny.basic import ConvNorm, TwoPairs, conv3


class TwoNames(ConvNorm):
    """Its conv has two names, and is called by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.conv


class TwoNamesForTheNorm(ConvNorm):
    """Its norm has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.bn


class TwoNamesBothCalled(TwoNames):
    """Its conv has two names, and is called by both."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.again(self.conv(x)))


class TwoParents(nn.Module):
    """Two pairs share one conv."""

    def __init__(self) -> None:
        super().__init__()
        conv = conv3()
        self.left, self.right = ConvNorm(conv), ConvNorm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class TwoParentsOnePair(nn.Module):
    """The pair is reached under two names, and called under one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = ConvNorm()
        self.right = nn.ModuleList([self.left])

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x)


class ReachedFromOutsideTheIsland(nn.Module):
    """Cannot be traced, and calls the conv of a child that can, without the norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e9:
            return x
        return self.inner(x) + self.inner.conv(x)


class HeldInAList(ConvNorm):
    """Calls the conv through a plain list, of which no module knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layers[0](x))


class TakesItsStagesOneByOne(nn.Module):
    """Cannot be traced, and iterates over an nn.Sequential: between a conv and its norm it keeps what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(conv3(), nn.BatchNorm2d(4), nn.ReLU(), conv3(), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x
        for i, layer in enumerate(self.stages):
            x = layer(x)
            if i == 0 and x.sum() < 1e9:
                kept = kept + x
        return x, kept


class HasAnotherMethod(TwoPairs):
    """Has a method that leaves its first norm out."""

    def without_a_norm(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first.conv(x)))


class CallsAnotherMethod(nn.Module):
    """Cannot be traced, and calls a method of its part that is not forward, and leaves its norm out."""

    def __init__(self) -> None:
        super().__init__()
        self.part = HasAnotherMethod()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part.without_a_norm(x)
        return y if y.sum() < 1e9 else x


class HeldInAPartial(ConvNorm):
    """Calls the conv through a `functools.partial`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = partial(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layer(x))


class HeldByItsMethod(HeldInAPartial):
    """Calls the conv through its bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.conv.forward


class HeldInAClosure(HeldInAPartial):
    """Calls the conv through a function that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = lambda x: self.conv(x)


class HeldWhereNobodyLooks(ConvNorm):
    """Calls the conv through an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SimpleNamespace(conv=self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layer.conv(x))


class KeptInAList(ConvNorm):
    """Called by a name that torch does not know; the registered one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {"first": [self.conv]}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.layers["first"][0](x)))


class NormKeptInAList(ConvNorm):
    """Calls the norm through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [self.bn]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norms[0](self.conv(x)))
