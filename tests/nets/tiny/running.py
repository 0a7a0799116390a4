"""What happens while a network runs: modes, gradients, precision, randomness, traces that it leaves."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tiny.basic import ConvNorm, TwoPairs, conv3


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


class FreezesItsFirstPair(TwoPairs):
    """Runs its first pair without gradients."""

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
    """Computes in bfloat16 whatever it is given."""

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
    """The identity, whose gradient is turned around."""

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
    """Computes both pairs anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class OnOnePixel(ConvNorm):
    """Its map is 1×1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3), keepdim=True))


class OnOnePixelWithoutNorm(ConvNorm):
    """Its map is 1×1, and no norm follows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x.mean((2, 3), keepdim=True)))


class DropsOut(nn.Module):
    """A functional dropout that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(self.conv(x)), 0.5, self.training)


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
    """Draws from Python's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * random.random()


class TrainReturnsNothing(ConvNorm):
    """As many people write it, so that a norm stays frozen."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.bn.eval()


class Picky(nn.Module):
    """No input can be found for it: it also takes a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 8, 3)

    def forward(self, x: Tensor, y: str) -> Tensor:
        return self.conv(x) if y == "yes" else x
