"""Small networks that are exported: blocks, several outputs, named inputs, and what cannot be exported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon

SHAPE = (1, 3, 32, 32)


class Convs(nn.Module):
    """Three convs with norms, a pooling, and a head: what a block can be put into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 6, 1)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem_norm(self.stem(image)))
        y = torch.relu(self.a_norm(self.a(self.pool(x))))
        return x, torch.relu(self.b_norm(self.b(y)) + y)

    def forward(self, image: Tensor) -> Tensor:
        made: Tensor = self.head(self.features(image)[1])
        return made


class Detector(Convs):
    """A backbone that gives maps by name."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        fine, coarse = self.features(image)
        return {"fine": fine, "coarse": self.head(coarse)}


class Pair(Convs):
    """Two outputs in a tuple, the first of them whole numbers; and two inputs with names."""

    def forward(self, image: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        made = self.head(self.features(image)[1]) * scale
        return made.argmax(1), made


@dataclass
class Maps:
    coarse: Tensor
    scores: Tensor


class Record(Convs):
    """A record of a class that torch does not know."""

    def forward(self, image: Tensor) -> Maps:  # type: ignore[override]
        made = self.head(self.features(image)[1])
        return Maps(made, made.mean((2, 3)))


class UNet(nn.Module):
    """Down, up and across: maps of two sizes are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.deep, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(48, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        y = self.norm(self.deep(self.down(x).relu())).relu()
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        made: Tensor = self.head(self.up(torch.cat([x, y], 1)).relu())
        return made


class Activations(nn.Module):
    """Constants that ONNX holds as attributes or numbers of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)
        self.steps = nn.Sequential(nn.GELU(), nn.Hardswish(), nn.LeakyReLU(0.01), nn.SiLU(), nn.Hardsigmoid())
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.mask = nn.Conv2d(8, 8, 1)  # what it is given was cast from truth values

    def forward(self, image: Tensor) -> Tensor:
        y = self.up(self.steps(self.norm(self.conv(image))))
        y = y + self.mask((y > 0).to(y.dtype))
        y = nn.functional.interpolate(self.pool(y), scale_factor=2.0, mode="bilinear")
        return y**2.0 / 3.7


class OneImage(Convs):
    """It takes one image, and no batch."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.view(1, 3, 32, 32))


class ByValue(Convs):
    """Which way it goes depends on the numbers that it is given."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) if image.sum() > 0 else image


class NoOperator(Convs):
    """It holds a step for which ONNX has no operator."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(image))


def made(kind: type[nn.Module], recipe: str | None = None, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """Build a network whose norms hide nothing, with blocks as a recipe says, folded again."""
    torch.manual_seed(0)
    net = shake_(kind(), gently=True).eval()
    if recipe is None:
        return net
    overrides = ["rules[1].with.min_size=2"] if recipe == "octave" else []
    return surgeon.fuse(surgeon.convert(net, recipe, shape, overrides=overrides), shape)
