"""Weights that are shared, read or computed, and kinds of convs, norms and numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.basic import ConvNorm, conv3


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


class TiedWeights(nn.Module):
    """Two convs have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv3(), conv3()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class TiedNorms(nn.Module):
    """Two norms have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = ConvNorm(), ConvNorm()
        self.two.bn.weight = self.one.bn.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class ReadsTheWeight(ConvNorm):
    """Reads the weight of its conv."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean()


class ReadsTheNormsWeight(ConvNorm):
    """Reads the weight of its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.mean()


class ReadsTheWeightUntraced(ConvNorm):
    """Reads the weight of its conv where tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean() if x.mean() < 1e9 else x


class ReadsTheGeometry(ConvNorm):
    """Reads the number of input channels of its conv."""

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


class Complex(nn.Module):
    """Has a conv with complex weights beside one with real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = conv3(dtype=torch.complex128), conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x.to(torch.complex128)).real)


class OwnConv(nn.Conv2d):
    """A Conv2d subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class NamedConv(nn.Conv2d):
    """A Conv2d subclass that adds nothing but an attribute."""

    note = "a class's own"

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.made_for = "a test"


class PadsFirst(nn.Conv2d):
    """A Conv2d subclass that holds a module which pads its input."""

    def __init__(self, *args: object, sides: int | tuple[int, int, int, int], **options: object) -> None:
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d(sides)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(
            self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ScalesItsWeight(nn.Conv2d):
    """A Conv2d subclass that convolves with another kernel than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias)


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
