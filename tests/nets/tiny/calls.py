"""How often a conv or a norm is called, and by whom its output is read."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tiny.basic import ConvNorm, conv3


class CalledTwiceNormAfterEach(ConvNorm):
    """The conv is called twice, each time before the same norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class CalledTwiceTwoNorms(ConvNorm):
    """The conv is called twice, before a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.bn(self.conv(x)).relu()))


class CalledTwiceNormOnOnePath(ConvNorm):
    """The conv is called twice, once without the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.relu())


class CalledAtTwoSizes(ConvNorm):
    """The conv is called twice, on maps of two sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[..., ::2, ::2])


class CalledByKeyword(ConvNorm):
    """The conv is given its input by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(input=x))


class NeverCalled(ConvNorm):
    """Has a conv that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = conv3()


class ReadTwice(ConvNorm):
    """The output of the conv is read by the norm and by a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class ReadByTwoConvs(ConvNorm):
    """The output of the conv is read by two others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv3(), conv3()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.one(y) * self.two(y)


class NormReadTwice(ConvNorm):
    """The output of the norm is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y.relu() + y


class NormReadByNobody(ConvNorm):
    """The output of the norm is read by nobody."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn(self.conv(x))
        return x


class NormCalledTwice(ConvNorm):
    """The norm is called behind the conv and on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(x)


class FunctionalNorm(ConvNorm):
    """Calls the norm as a function, with its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
