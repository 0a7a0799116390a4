"""Tiny networks, one per hazard and named for it. They take SHAPE; the convs are such that ACBlocks want them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


class ActsOnShapes(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., ::2] if x.shape[-1] > 4 else x)


class ActsOnAnAttribute(ConvNorm):
    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.normed else self.conv(x)


class DropsPaths(nn.Module):
    """A residual branch that is left out at random while it trains."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = conv3(), nn.BatchNorm2d(4), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.bn(self.conv(x)))


class CountsItsCalls(ConvNorm):
    """Changes a buffer in place, and puts another one in the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return super().forward(x - self.mean[:, None, None])


class Checkpointed(nn.Module):
    """Computes its block anew in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = ConvNorm(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


class TwoPairs(nn.Module):
    """What octave needs to let two streams go from conv to conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class FreezesItsFirstPair(TwoPairs):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class TakesGradientsInEvalMode(TwoPairs):
    """As networks do that look at how they change with their input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.first(x)
        return self.second(y)


class EntersAutocast(TwoPairs):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return y.float()


class LeavesAutocast(TwoPairs):
    """As it is written for a GPU, also where there is none."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            x = self.first(x)
        return self.second(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class ReversesGradients(TwoPairs):
    """As domain adversarial networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(Reversed.apply(x)))


class CheckpointedPairs(TwoPairs):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class AsksForATensor(TwoPairs):
    """Takes a tensor, or a dict that holds one; of a dict it skips a norm."""

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return super().forward(x)
        return self.second(self.first.conv(x["image"]))


class AsksTorchForATensor(AsksForATensor):
    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        return TwoPairs.forward(self, x) if torch.is_tensor(x) else self.second.conv(self.first(x["image"]))


class AsksForAnAttribute(TwoPairs):
    """Tracing believes that whatever it asks for is there."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if hasattr(x, "tensors") else y


class FallsBack(TwoPairs):
    """Tracing never falls."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.first(x.view(-1))
        except (RuntimeError, IndexError):
            x = self.first(x)
        return self.second(x)


class WithoutABatch(nn.Module):
    """Hands its convs one map alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv3(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[0]).mean((1, 2)))


class Complex(nn.Module):
    """Has a conv with complex weights beside one with real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = conv3(dtype=torch.complex128), conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x.to(torch.complex128)).real)


class ScriptedChild(TwoPairs):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.jit.script(self.first.eval())


class OddName(TwoPairs):
    """A name that torch allows, and that no Python can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("the first", self.first)
        del self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.get_submodule("the first")(x))


class OnOnePixel(ConvNorm):
    """Its map is 1×1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3), keepdim=True))


class OnOnePixelWithoutNorm(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x.mean((2, 3), keepdim=True)))


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


# Arguments and results


class TakesArguments(ConvNorm):
    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(maps[0]) * maps[1]


class TakesKeywords(ConvNorm):
    def forward(self, x: Tensor, **options: float) -> Tensor:
        return super().forward(x) * options.get("scale", 1.0)


class TakesAKeywordOnly(ConvNorm):
    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) if scale is None else super().forward(x) * scale


class TakesTwo(ConvNorm):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) * y


class TakesAList(ConvNorm):
    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return super().forward(maps[0]) * maps[1]


class TakesADict(ConvNorm):
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().forward(batch["image"]) * batch["scale"]


class ReturnsADict(ConvNorm):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"out": super().forward(x), "inputs": [x]}


class ReturnsATuple(ConvNorm):
    def forward(self, x: Tensor) -> tuple[object, ...]:
        y = super().forward(x)
        return y, (y.mean(), None)


@dataclass
class Result:
    out: Tensor
    note: str = ""


class ReturnsADataclass(ConvNorm):
    def forward(self, x: Tensor) -> Result:
        return Result(super().forward(x))


class ReturnsListsOfDifferentLength(ConvNorm):
    """One more while it trains, as networks with auxiliary heads do."""

    def forward(self, x: Tensor) -> list[Tensor]:
        y = super().forward(x)
        return [y, y.mean((2, 3))] if self.training else [y]


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
    def __init__(self) -> None:
        super().__init__()
        self.layer = partial(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layer(x))


class HeldByItsMethod(HeldInAPartial):
    def __init__(self) -> None:
        super().__init__()
        self.layer = self.conv.forward


class HeldInAClosure(HeldInAPartial):
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


# Calls and readers


class CalledTwiceNormAfterEach(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class CalledTwiceTwoNorms(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.bn(self.conv(x)).relu()))


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


class ReadByTwoConvs(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv3(), conv3()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.one(y) * self.two(y)


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


class ComputesAWeight(ConvNorm):
    """A functional convolution whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.scale = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.weight * self.scale, padding=1))


class WeightsInAParameterList(ConvNorm):
    """Functional convolutions whose weights are Parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4, 3, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.conv2d(x, weight, padding=1)
        return super().forward(x)


class NestedContainers(nn.Module):
    """Its layers are in lists of dicts of lists, and no module calls another."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([conv3(), nn.BatchNorm2d(4)])
        self.stages = nn.ModuleList([nn.ModuleDict({"body": layers, "skip": conv3()})])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            y = x
            for layer in stage["body"]:
                y = layer(y)
            x = stage["skip"](x) + y
        return x


# Kinds


class Quantised(ConvNorm):
    """Has a conv in whole numbers beside one in floating point."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.nn import quantized  # here, for torch means to move it

        self.small = quantized.Conv2d(4, 4, 3, padding=1)
        self.small.scale = 0.1
        weight = torch.quantize_per_tensor(torch.randn(4, 4, 3, 3), 0.02, 0, torch.qint8)
        self.small.set_weight_bias(weight, torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.quantize_per_tensor(x.float(), 0.1, 100, torch.quint8)
        return super().forward(self.small(whole).dequantize().to(x.dtype))


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
