"""A small residual network for 28x28 grey images, named like torchvision's.

    y = relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))

He et al. 2016, Deep Residual Learning, arXiv:1512.03385, eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import nn


class SmallResNet(nn.Module):
    """A 3x3 stem and three stages of basic blocks: `width` channels at 28x28, twice at 14x14, four times at 7x7.

    >>> import torch
    >>> net = SmallResNet()
    >>> net(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in net.parameters())
    77754
    """

    __module__ = "surgeon.nn"

    def __init__(self, width: int = 16, blocks: tuple[int, int, int] = (1, 1, 1), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (n, 1, 28, 28) into logits (n, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convs beside a shortcut, which is a 1x1 conv where the shape changes."""

    __module__ = "surgeon.nn"

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        # An empty Sequential passes x on and, unlike an Identity, leaves no node in a traced graph.
        self.downsample = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, c_in, h, w) to (n, c_out, h/stride, w/stride), rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.downsample(x)
        activated: torch.Tensor = self.relu(out)
        return activated


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Stack basic blocks; the first one changes channels and resolution."""
    rest = (BasicBlock(c_out, c_out) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)
