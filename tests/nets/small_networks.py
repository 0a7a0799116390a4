"""Networks that no library at hand has, written from their papers, and small ones of a library's."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn


class MobileNetV1(nn.Module):
    """A strided stem and thirteen pairs of a depthwise 3×3 and a 1×1 conv.

    Howard et al. 2017, MobileNets, arXiv:1704.04861, table 1.
    """

    PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers, width = [_normed(3, 32, 3, stride=2)], 32
        for c_out, stride in self.PAIRS:
            layers += [_normed(width, width, 3, stride=stride, groups=width), _normed(width, c_out, 1)]
            width = c_out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


def small_densenet() -> nn.Module:
    """A DenseNet of four blocks, as those with a hundred layers are made, with two or four layers in each."""
    return torchvision.models.DenseNet(8, block_config=(2, 4, 4, 2), num_init_features=16)


def _normed(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
