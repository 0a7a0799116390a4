"""Tiny networks, one per hazard and named for it. They take SHAPE; the convs are such that ACBlocks want them."""

from __future__ import annotations

import random
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (2, 4, 9, 8)


def conv3(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


class ConvNorm(nn.Module):
    """The ordinary pair, without a hazard."""

    def __init__(self, conv: nn.Module | None = None, bn: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv3() if conv is None else conv
        self.bn = nn.BatchNorm2d(4) if bn is None else bn

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Own(nn.Module):
    """A person's own network: methods, attributes, a submodule that is no conv, a switch that `forward` looks at."""

    family: ClassVar[str] = "own"

    def __init__(self, classes: int = 5, *, pooled: bool = True) -> None:
        super().__init__()
        self.stem = ConvNorm(conv3(bias=False))
        self.body = nn.Sequential(ConvNorm(conv3(stride=2)), ConvNorm(conv3(groups=4)))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(4, classes)
        self.register_buffer("mean", torch.tensor(0.5))
        self.pooled = pooled
        self.labels = [f"class {i}" for i in range(classes)]

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x - self.mean))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(self.drop(features.mean((2, 3)))) if self.pooled else features

    def best(self, x: Tensor) -> str:
        return self.labels[int(self(x)[0].argmax())]


# What tracing meets


class ActsOnItsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if self.training else self.second(torch.sigmoid(y))


class ActsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.mean() > 1e9:  # the culprit
            return y
        return self.second(y)


class ActsOnValuesWithStages(nn.Module):
    """Its children are in containers, which have no forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([ConvNorm(), ConvNorm()])
        self.heads = nn.ModuleDict({"a": ConvNorm(), "b": nn.Sequential(nn.ReLU(), conv3())})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x) if x.mean() < 1e9 else x
        return self.heads["a"](x) + self.heads["b"](x)


class FollowsStages(ActsOnValuesWithStages):
    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.heads["a"](x) + self.heads["b"](x)


class DropsOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(self.conv(x)), 0.5, self.training)


class HoldsAConstant(nn.Module):
    """Makes a tensor in `forward`, which tracing keeps as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x - torch.tensor(0.5)))


class MaySkipTheNorm(nn.Module):
    """Reads the conv directly if an optional argument says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if scale is None else y * scale


class MaySkipTheNormInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MaySkipTheNorm()

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e9:
            return x
        return self.inner(x) + self.inner(x, torch.tensor(2.0))


class HasAnIdleArgument(nn.Module):
    """Its optional argument decides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, note: str = "") -> Tensor:
        return self.bn(self.conv(x))


class HasAnIdleArgumentInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = HasAnIdleArgument()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() < 1e9 else x


class LeavesTraces(nn.Module):
    """Does to itself and to the world whatever a forward can do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.idle = conv3(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.log: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        print("forward was here")
        warnings.warn("forward was here", stacklevel=2)
        self.calls += 1
        self.log.append("called")
        self.last = x
        self.seen += 1
        self.bn.eval()
        with torch.no_grad():
            self.idle.running_mean.add_(1)
        return self.bn(self.conv(x)) + torch.rand(4, 1, 1).to(x.device)


class DrawsInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * random.random()


class NeedsValues(nn.Module):
    """Cannot run on the meta device: how often the conv runs depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 + int(x.mean().item() > 1e9)):
            x = self.conv(x)
        return x


class TrainReturnsNothing(ConvNorm):
    """As many people write it, so that a norm stays frozen."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.bn.eval()


# Names


class TwoNames(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.conv


class TwoNamesForTheNorm(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.bn


class TwoNamesBothCalled(TwoNames):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.again(self.conv(x)))


class TwoParents(nn.Module):
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


# Calls and readers


class CalledTwiceNormAfterEach(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class CalledTwiceNormOnOnePath(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.relu())


class CalledAtTwoSizes(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[..., ::2, ::2])


class CalledByKeyword(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(input=x))


class NeverCalled(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.spare = conv3()


class WeightReadOnly(ConvNorm):
    """The spare conv lends its weight, and is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = conv3()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.spare.weight, padding=1))


class WeightReadUnseen(WeightReadOnly):
    """The same where tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] == 4 and bool((x == x).all()) else x


class KeptInAList(ConvNorm):
    """Called by a name that torch does not know; the registered one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {"first": [self.conv]}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.layers["first"][0](x)))


class NormKeptInAList(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [self.bn]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norms[0](self.conv(x)))


class ReadTwice(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class NormReadTwice(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y.relu() + y


class NormReadByNobody(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.bn(self.conv(x))
        return x


class NormCalledTwice(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(x)


class FunctionalNorm(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)


# Tensors


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv3(), conv3()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class TiedNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = ConvNorm(), ConvNorm()
        self.two.bn.weight = self.one.bn.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class ReadsTheWeight(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean()


class ReadsTheNormsWeight(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.mean()


class ReadsTheWeightUntraced(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean() if x.mean() < 1e9 else x


class ReadsTheGeometry(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) / self.conv.in_channels


class AffineByHand(nn.Module):
    """A functional convolution: no module to swap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.conv = conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.weight, padding=1))


# Kinds


class OwnConv(nn.Conv2d):
    """A Conv2d subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm2d subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class LastNorm(nn.LayerNorm):
    """A LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class KeepsState(ConvNorm):
    """Stores something in its state dict that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass
