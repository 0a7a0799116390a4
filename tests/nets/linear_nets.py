"""Networks that are linear between two activations, drawn at random, and blocks of papers by their equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4


class Op(NamedTuple):
    """A step: its kind, the values that it reads (0 is the input), and numbers that choose its geometry."""

    kind: str
    reads: tuple[int, ...]
    numbers: tuple[int, ...] = (0, 0, 0)


LINEAR = ("conv", "point", "depthwise", "norm", "scale", "number", "same", "pool", "pad", "halves", "neg", "half")
SUMS = ("add", "sub", "cat", "iadd")


class RandomNet(nn.Module):
    """x → relu(the last value), plus the values that are also given out; every map has 4 channels and one size."""

    def __init__(self, ops: Sequence[Op], *, also: Sequence[int] = ()) -> None:
        super().__init__()
        self.ops, self.also = list(ops), tuple(also)
        for i, op in enumerate(ops):
            module = _module(op)
            if module is not None:
                self.add_module(f"m{i}", module)
            if op.kind == "scale":
                self.register_parameter(f"gamma{i}", nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5))

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for i, op in enumerate(self.ops):
            given = [values[one] for one in op.reads]
            values.append(self._step(i, op, given))
        out = F.relu(values[-1])
        return (out, *(values[one] for one in self.also)) if self.also else out

    def _step(self, i: int, op: Op, given: list[Tensor]) -> Tensor:
        if hasattr(self, f"m{i}"):
            module: Callable[..., Tensor] = getattr(self, f"m{i}")
            return module(torch.cat(given, 1)) if op.kind == "cat" else module(*given)
        if op.kind == "halves":
            first, second = given[0].chunk(2, 1)
            return torch.cat([second, first], 1)
        if op.kind == "scale":
            return given[0] * getattr(self, f"gamma{i}")
        ways: dict[str, Callable[..., Tensor]] = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "iadd": _added_in_place,
            "number": lambda a: a + 0.25,
            "neg": lambda a: -a,
            "half": lambda a: a / 2,
            "relu": F.relu,
            "square": lambda a: a * a,
            "softmax": lambda a: a.softmax(1),
            "max": lambda a: F.max_pool2d(a, 3, 1, 1),
        }
        return ways[op.kind](*given)


def _added_in_place(a: Tensor, b: Tensor) -> Tensor:
    made = a * 1.0
    made += b
    return made


def _module(op: Op) -> nn.Module | None:
    one, two, three = op.numbers
    kernel, dilation = ((1, 3, 5)[one % 3], (3, 1)[two % 2]), 1 + three % 2
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    if op.kind in ("conv", "depthwise"):
        groups = CHANNELS if op.kind == "depthwise" else (1, 2)[three % 2]
        return nn.Conv2d(
            CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation, groups=groups, bias=bool(one % 2)
        )
    if op.kind == "pad":
        return nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(CHANNELS, CHANNELS, 3, bias=bool(one % 2)))
    modules: dict[str, Callable[[], nn.Module]] = {
        "point": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, bias=bool(one % 2)),
        "cat": lambda: nn.Conv2d(2 * CHANNELS, CHANNELS, 1, bias=bool(one % 2)),
        "norm": lambda: nn.BatchNorm2d(CHANNELS),
        "same": nn.Identity,
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
    }
    return modules[op.kind]() if op.kind in modules else None


class RepVGGBlock(nn.Module):
    """relu(bn₃(W₃∗x) + bn₁(W₁∗x) + bn₀(x)), Ding et al. 2021, arXiv:2101.03697, eq. 1 to 3."""

    def __init__(self, c: int, *, groups: int = 1) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(c))
        self.one = nn.Sequential(nn.Conv2d(c, c, 1, groups=groups, bias=False), nn.BatchNorm2d(c))
        self.zero = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.three(x) + self.one(x) + self.zero(x))


class MobileOneBlock(nn.Module):
    """relu(Σ bnᵢ(Wᵢ∗x) + bn(W₁∗x) + bn₀(x)) with k branches, Vasu et al. 2022, arXiv:2206.04040, figure 3."""

    def __init__(self, c: int, branches: int = 3) -> None:
        super().__init__()
        make = lambda k: nn.Sequential(  # noqa: E731 - the two kinds of branch
            nn.Conv2d(c, c, k, padding=k // 2, groups=c, bias=False), nn.BatchNorm2d(c)
        )
        self.wide = nn.ModuleList([make(3) for _ in range(branches)])
        self.scale, self.skip = make(1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        out = self.skip(x) + self.scale(x)
        for branch in self.wide:
            out = out + branch(x)
        return F.relu(out)


class DiverseBranch(nn.Module):
    """Four branches of Ding et al. 2021, arXiv:2103.13425, figure 2; `careless` pads between 1×1 and 3×3 with zeros."""

    def __init__(self, c: int, *, careless: bool = False) -> None:
        super().__init__()
        between = 1 if careless else 0
        self.pads = nn.ZeroPad2d(1 - between)
        self.own, self.own_bn = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.point, self.point_bn = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.first, self.first_bn = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.second, self.second_bn = nn.Conv2d(c, c, 3, padding=between, bias=False), nn.BatchNorm2d(c)
        self.before = nn.Conv2d(c, c, 1, bias=False)
        self.mean, self.mean_bn = nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.second_bn(self.second(self.first_bn(self.first(self.pads(x)))))
        means = self.mean_bn(self.mean(self.before(x)))  # its norm behind the 1×1 would put a bias before the padding
        return F.relu(self.own_bn(self.own(x)) + self.point_bn(self.point(x)) + sequence + means)


class OrepaBlock(nn.Module):
    """One conv whose kernel is a sum of scaled kernels, Hu et al. 2022, arXiv:2204.00826, and a 1×1 beside it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight_3, self.weight_1 = nn.Parameter(torch.randn(c, c, 3, 3)), nn.Parameter(torch.randn(c, c, 1, 1))
        self.vector = nn.Parameter(torch.rand(2, c))
        self.norm, self.beside = nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.einsum("oihw,o->oihw", self.weight_3, self.vector[0])
        kernel = wide + F.pad(self.weight_1 * self.vector[1].view(-1, 1, 1, 1), (1, 1, 1, 1))
        return F.relu(self.norm(F.conv2d(x, kernel, padding=1)) + self.beside(x))


class AsymmetricBlock(nn.Module):
    """relu(bn(F∗x) + bn(F_v∗x) + bn(F_h∗x)), Ding et al. 2019, arXiv:1908.03930."""

    def __init__(self, c: int) -> None:
        super().__init__()
        sizes = {"square": (3, 3), "ver": (3, 1), "hor": (1, 3)}
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Conv2d(c, c, size, padding=(size[0] // 2, size[1] // 2), bias=False), nn.BatchNorm2d(c)
                )
                for name, size in sizes.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum(branch(x) for branch in self.branches.values()))


class Nested(nn.Module):
    """A branch of a branch: (bn(W₃∗(x·γ)) + x) + bn(W₁∗x) in modules of their own, then scaled and added to x."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner, self.gamma = _Inner(c), nn.Parameter(torch.rand(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.gamma * self.inner(x))


class _Inner(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(c, 1, 1))
        self.wide = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.point = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x * self.scale) + x + self.point(x)
