"""What the other networks are made of, and the ordinary ones."""

from __future__ import annotations

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


class TwoPairs(nn.Module):
    """What octave needs to let two streams go from conv to conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Own(nn.Module):
    """A user's own network: methods, attributes, a submodule that is no conv, a switch that `forward` looks at."""

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
