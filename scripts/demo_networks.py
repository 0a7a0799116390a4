"""The networks that scripts/train_demo.py trains on Fashion-MNIST, and the benchmark of fitting converts.

| name | what | pixels |
|---|---|---|
| small | the demo's SmallResNet | 28 |
| wide | the same with 48 channels in its first stage, nine times the multiply-adds | 28 |
| vgg | eight 3x3 convs with batch norms and three max pools, no shortcuts | 28 |
| deep | torchvision's ResNet-18 for one input channel and ten classes | 64 |

Simonyan and Zisserman 2015, arXiv:1409.1556; He et al. 2016, arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet

CLASSES = 10
WIDE = 48


class SmallVGG(nn.Module):
    """Pairs of 3x3 convs, each conv with a batch norm, and a max pool between pairs.

    >>> SmallVGG((8, 16))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        self.features = nn.Sequential(*_pairs(widths))
        self.classifier = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (n, 1, h, w) into logits (n, classes)."""
        logits: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def _pairs(widths: tuple[int, ...]) -> Iterator[nn.Module]:
    """Give the layers of a VGG: two convs for each width, each with its norm and ReLU."""
    c_in = 1
    for stage, width in enumerate(widths):
        if stage:
            yield nn.MaxPool2d(2)
        for _ in range(2):
            yield from (nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            c_in = width


@dataclass(frozen=True, slots=True)
class Network:
    """A network by name: what builds it, untrained, and the size of its images."""

    build: Callable[[], nn.Module]
    pixels: int = 28

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn bytes (n, 28, 28) into the images (n, 1, h, w) that the network takes, enlarged where it wants more."""
        x = data.normalise(pixels)
        if self.pixels == x.shape[-1]:
            return x
        return F.interpolate(x, (self.pixels, self.pixels), mode="bilinear", align_corners=False)


def wide() -> nn.Module:
    """Build the demo's network with three times its channels."""
    return SmallResNet(WIDE)


def deep() -> nn.Module:
    """Build torchvision's ResNet-18 for grey images."""
    from torchvision.models import resnet18  # not needed by the networks of the demo

    model: nn.Module = resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws it
    return model


NETWORKS = {
    "small": Network(SmallResNet),
    "wide": Network(wide),
    "vgg": Network(SmallVGG),
    "deep": Network(deep, pixels=64),
}
