"""What tracing meets: decisions, questions, names and values that a graph cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiny.basic import ConvNorm, TwoPairs, conv3


class ActsOnItsMode(nn.Module):
    """Computes something else in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if self.training else self.second(torch.sigmoid(y))


class ActsOnValues(nn.Module):
    """Decides by the numbers that it sees, so that tracing cannot follow."""

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
    """The same stages and heads, and no decision."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.heads["a"](x) + self.heads["b"](x)


class ActsOnShapes(ConvNorm):
    """Halves maps that are wide."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., ::2] if x.shape[-1] > 4 else x)


class ActsOnAnAttribute(ConvNorm):
    """Calls its norm or not, as an attribute says."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.normed else self.conv(x)


class AsksForATensor(TwoPairs):
    """Takes a tensor, or a dict that holds one; of a dict it skips a norm."""

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return super().forward(x)
        return self.second(self.first.conv(x["image"]))


class AsksTorchForATensor(AsksForATensor):
    """The same, asked with `torch.is_tensor`."""

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


class ScriptedChild(TwoPairs):
    """Its first pair is a scripted module."""

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
    """Calls a child both with and without its optional argument."""

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
    """The same in a child of a network that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HasAnIdleArgument()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() < 1e9 else x


class NeedsValues(nn.Module):
    """Cannot run on the meta device: how often the conv runs depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 + int(x.mean().item() > 1e9)):
            x = self.conv(x)
        return x
