"""Small networks of every kind that people have, with numbers as after training, for `mutations.py`.

Each step is a module of its own, so that a fault can be put at any of them and has a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.nn import ACBlock

ACBLOCK = {"kernel": [3, 5]}


def unit(
    c_in: int, c_out: int, kernel: int = 3, act: type[nn.Module] | None = nn.ReLU, **rest: object
) -> nn.Sequential:
    """Make a conv, its norm and an activation."""
    padding = rest.pop("padding", kernel // 2)
    conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=False, **rest)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([act()] if act else []))


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.one = unit(c_in, c_out, stride=stride)
        self.two = unit(c_out, c_out, act=None)
        self.short = unit(c_in, c_out, 1, act=None, stride=stride) if c_in != c_out else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.one(x)) + self.short(x))


class ResNet(nn.Module):
    """Residual blocks, a global mean, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.stages = nn.Sequential(Residual(8, 8), Residual(8, 16, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


class Deep(nn.Module):
    """Three stages, each wider than the one before, and a global mean of many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.stages = nn.Sequential(Residual(8, 8), Residual(8, 16, 2), Residual(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def vgg() -> nn.Module:
    """Plain convs with biases, max poolings and a dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(3, 2, 1)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 10)),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Hardsigmoid()
        self.less, self.more = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.more(self.act(self.less(self.pool(x)))))


class Inverted(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = c_in * 2
        self.expand = unit(c_in, wide, 1, nn.Hardswish)
        self.depthwise = unit(wide, wide, kernel, nn.Hardswish, groups=wide, stride=stride)
        self.excite = SqueezeExcite(wide)
        self.project = unit(wide, c_out, 1, None)
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.is_residual else y


def mobile() -> nn.Module:
    """Depthwise convs, squeeze-and-excite, hard-swish."""
    blocks = (Inverted(8, 8, 1, 3), Inverted(8, 12, 2, 5))
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return nn.Sequential(unit(3, 8, act=nn.Hardswish, stride=2), *blocks, *tail)


class Grow(nn.Module):
    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(c_in), nn.ReLU()  # before its conv: no fold takes it
        self.squeeze = unit(c_in, 8, 1)
        self.conv = nn.Conv2d(8, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.squeeze(self.act(self.norm(x))))], 1)


def dense() -> nn.Module:
    """Concatenations, and norms that stay."""
    body = (unit(3, 8), Grow(8, 4), Grow(12, 4), nn.AvgPool2d(2), unit(16, 8), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 10))


class UNet(nn.Module):
    """A way down, a way up, and the label of every pixel."""

    def __init__(self, labels: bool = True) -> None:
        super().__init__()
        self.enter, self.pool, self.deep = unit(3, 8), nn.MaxPool2d(2), unit(8, 16, dilation=2, padding=2)
        self.up, self.join = nn.Upsample(scale_factor=2, mode="nearest"), unit(24, 8)
        self.head, self.labels = nn.Conv2d(8, 5, 1), labels

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        scores = self.head(self.join(torch.cat([first, self.up(self.deep(self.pool(first)))], 1)))
        return scores.argmax(1) if self.labels else scores


def softmax() -> nn.Module:
    """Probabilities at the end, and a leaky ReLU."""
    body = (unit(3, 8, act=nn.LeakyReLU), unit(8, 8, stride=2), unit(8, 16), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 10), nn.Softmax(1))


class Odd(nn.Module):
    """Groups, dilation, reflected borders, rectangular and large kernels, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8, 5, padding_mode="reflect")
        self.grouped = unit(8, 8, groups=2)
        self.dilated = unit(8, 8, dilation=2, padding=2)
        self.flat = nn.Sequential(
            nn.Conv2d(8, 8, (3, 5), (1, 2), (1, 2), bias=True), nn.BatchNorm2d(8, 1e-3), nn.ReLU()
        )
        self.map, self.aux = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.flat(self.dilated(self.grouped(self.stem(x))))
        return {"map": self.map(y), "aux": self.aux(y)}


class Pair(nn.Module):
    """Two outputs in a tuple, of which one is a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean = nn.Sequential(unit(3, 8), unit(8, 8)), nn.AdaptiveAvgPool2d(1)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mean(self.body(x)).flatten(1)
        return self.left(y), self.right(y)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "deep": Deep,
    "vgg": vgg,
    "mobile": mobile,
    "dense": dense,
    "unet": UNet,
    "softmax": softmax,
    "odd": Odd,
    "pair": Pair,
}
SIDE = 16


def example(side: int = SIDE, batch: int = 2, channels: int = 3) -> tuple[int, int, int, int]:
    return (batch, channels, side, side)


def settle_(model: nn.Module, generator: torch.Generator, side: int = SIDE) -> nn.Module:
    """Give every norm numbers as after training: its statistics are near those of what goes through it."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            _draw_(norm.weight, generator, 0.5, 1.5)
            _draw_(norm.bias, generator, -0.5, 0.5)
        for block in model.modules():
            if isinstance(block, ACBlock):  # the strips take part, as after training
                _draw_(block.ver_bn.weight, generator, 0.2, 0.6)
                _draw_(block.hor_bn.weight, generator, 0.2, 0.6)
        hooks = [norm.register_forward_pre_hook(_measure(generator)) for norm in norms]
        model.eval()(torch.randn(example(side, 4), generator=generator, dtype=torch.float64).to(dtype_of(model)))
        for hook in hooks:
            hook.remove()
    return model


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _draw_(tensor: Tensor, generator: torch.Generator, low: float, high: float) -> None:
    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)


def _measure(generator: torch.Generator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def set_(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams = args[0] if isinstance(args[0], tuple) else args[:1]  # two of them between octave convs
        channels = [x.detach().double().transpose(0, 1).flatten(1) for x in streams if x is not None]
        means = torch.cat([x.mean(1) for x in channels])
        spread = torch.cat([x.std(1, correction=0) for x in channels]) + 1e-3
        noise = torch.rand(2, len(means), generator=generator, dtype=torch.float64)
        norm.running_mean.copy_(means + (noise[0] - 0.5) * spread)  # type: ignore[operator,union-attr]
        norm.running_var.copy_((spread * (0.75 + noise[1] / 2)).square())  # type: ignore[operator,union-attr]

    return set_


def build(name: str, generator: torch.Generator, side: int = SIDE) -> nn.Module:
    """Make a network in float32, with numbers of its own for every seed of the generator."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    return settle_(NETS[name](), generator, side)


STEPS = 40


def train_(model: nn.Module, generator: torch.Generator, side: int, channels: int = 3) -> nn.Module:
    """Train for some steps on smooth patterns, so that weights and statistics belong together as nothing drawn does."""
    patterns = nn.functional.interpolate(
        torch.randn(4, channels, 4, 4, generator=generator), size=side, mode="bilinear"
    )
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with torch.enable_grad():
        for _ in range(STEPS):
            classes = torch.randint(4, (16,), generator=generator)
            x = patterns[classes] + 0.3 * torch.randn(16, channels, side, side, generator=generator)
            loss = sum(nn.functional.cross_entropy(scores, classes) for scores in _scores(model, x))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def _scores(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Give scores of at least four classes for every output; instead of labels those that they come from."""
    for module in model.modules():
        if isinstance(module, UNet):
            module.labels = False
    for leaf in pytree.tree_leaves(model(x)):
        yield leaf.flatten(2).mean(2) if leaf.ndim > 2 else leaf
    for module in model.modules():
        if isinstance(module, UNet):
            module.labels = True


STATISTICS = ("plain", "trained", "tiny variance", "huge and tiny gamma", "zero gamma", "huge bias", "one dead norm")


def extreme_(model: nn.Module, how: str, generator: torch.Generator) -> nn.Module:
    """Give every norm (one in two channels of it) statistics that trained networks have been seen with."""
    norms: Sequence[nn.BatchNorm2d] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        some = torch.rand(norm.num_features, generator=generator) < 0.5
        powers = 10 ** (torch.rand(norm.num_features, generator=generator, dtype=torch.float64) * 44 - 40)
        with torch.no_grad():
            if how == "tiny variance":
                norm.running_var[some] = 1e-12
                norm.weight[some] *= 3e-3  # as training makes it, where the variance has collapsed
            elif how == "huge and tiny gamma":
                norm.weight[some] = powers[some].to(norm.weight.dtype)
            elif how == "zero gamma":
                norm.weight[some] = 0
            elif how == "huge bias":
                norm.bias[some] = (norm.bias[some].double().sign() * 3e3).to(norm.bias.dtype)
            elif how == "one dead norm" and i == len(norms) // 2:
                norm.weight.zero_()
    return model
