"""What meets an octave map: other maps, masks, positions, bounds and numbers, of every shape that broadcasts to it.

Each is led through the streams, or low-passed where it is added, or there is a seam: never an error, and the result is
what plain Python computes with every conv splitting and joining for itself.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis.network import Network
from surgeon.analysis.rewritten import Rewritten
from surgeon.conv import streams
from surgeon.surgery import operate

C = 8
SHAPE = (2, 3, 12, 10)
RECIPE = {
    "rules": [
        {"leave": "plain", "match": {"name": ["stem", "side", "one", "gate", "last"]}, "optional": True},
        {"swap": "octave", "match": {"name": "a"}, "with": {"min_size": 1, "alpha_out": 0.5}},
        {"swap": "octave", "match": {"name": "head"}, "with": {"min_size": 1, "alpha_out": 0}},
        {"swap": "octave", "with": {"min_size": 1}},
    ],
    "surgeon": 1,
    "title": "T",
}


class Meets(nn.Module):
    """An octave map `y` meets something; `x` is the image, and `s` a plain map of as many channels as `y` has."""

    def __init__(self, meet: Callable[[Meets, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.side, self.one = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1), nn.Conv2d(3, 1, 1)
        self.a, self.b, self.c = (nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(C, 1, 3, padding=1)
        self.last, self.gate, self.meet = nn.Conv2d(C, 2, 1), nn.Linear(3, C), meet
        self.register_buffer("positions", torch.randn(C, 12, 10))
        self.register_buffer("plane", torch.randn(12, 10))
        self.register_buffer("rows", torch.randn(12, 1))
        self.register_buffer("stripes", torch.randn(1, C, 12, 1))
        self.register_buffer("columns", torch.randn(10))
        self.register_buffer("bounds", torch.rand(C, 1, 1))
        self.register_buffer("short", torch.randn(1, C, 12, 10, dtype=torch.float16))
        self.register_buffer("mask", torch.randn(12, 10) > 0)
        self.grid = nn.Parameter(torch.randn(C, 12, 10))
        self.scale, self.number = nn.Parameter(torch.rand(1, C, 1, 1)), nn.Parameter(torch.rand(()))
        self.single = nn.Parameter(torch.rand(1))
        self.low: tuple[tuple[int, int], ...] = ()  # of a map that is low-passed, where that is done by hand

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x))
        return self.last(self.c(self.b(self.meet(self, y, self.side(x), x))))

    def soft(self, value: Tensor) -> Tensor:
        return streams.low_pass(value, self.low) if self.low else value


def _in_place(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    s = net.soft(s * 2)
    s += y
    return s


def _written_and_read_again(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    s = s * 2
    t = s.add_(y)
    return t + s * 0.5


def _changed_after_a_join(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    flipped = y.flip(-1)
    y.relu_()
    return net.soft(y.flip(-2) + flipped) + net.b(y)


def _fine(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    return y * F.adaptive_avg_pool2d(net.b(y), (1, 1)) + net.soft(F.avg_pool2d(net.b(y), (1, 10)))


def _broadcast_head(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    return net.head(y) + s + x[:, :1]


def _two_channels(net: Meets, y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    return torch.cat([net.one(x) * s, y], 1)[:, 4:12]


FREE, SOFT, SEAM, BOTH, LOCAL = "free", "low-passed", "seam", "low-passed, and a seam", "not rewritten"
STEPS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a plain map": (lambda n, y, s, x: y + n.soft(s), SOFT),
    "a plain map, first": (lambda n, y, s, x: n.soft(s) + y, SOFT),
    "a plain map, by name": (lambda n, y, s, x: torch.add(input=y, other=n.soft(s)), SOFT),
    "twice a plain map": (lambda n, y, s, x: torch.add(y, n.soft(s), alpha=2), SOFT),
    "twice a plain map, by name first": (lambda n, y, s, x: torch.add(y, alpha=2, other=n.soft(s)), SOFT),
    "less a plain map": (lambda n, y, s, x: n.soft(s) - y, SOFT),
    "into a plain map": (_in_place, SOFT),
    "into a plain map that is read again": (_written_and_read_again, SEAM),
    "another octave map": (lambda n, y, s, x: y + n.b(y), FREE),
    "itself": (lambda n, y, s, x: y + y, FREE),
    "itself, squared": (lambda n, y, s, x: y * y, FREE),
    "changed in place after a join": (_changed_after_a_join, BOTH),
    "a map of one channel": (lambda n, y, s, x: y + n.one(x), SEAM),
    "a map of one channel, in place": (lambda n, y, s, x: operator.iadd(y, n.one(x)), SEAM),
    "a map of one channel that has no name": (lambda n, y, s, x: y + x.mean(1, keepdim=True), SEAM),
    "a map without channels": (lambda n, y, s, x: y + x[0, 0], SEAM),
    "positions (C, h, w)": (lambda n, y, s, x: y + n.soft(n.positions), SOFT),
    "positions (C, h, w), first": (lambda n, y, s, x: n.soft(n.positions) + y, SOFT),
    "positions (1, C, h, w)": (lambda n, y, s, x: y + n.soft(n.grid.unsqueeze(0)), SOFT),
    "positions (h, w)": (lambda n, y, s, x: y + n.plane, SEAM),
    "positions (h, 1)": (lambda n, y, s, x: y + n.rows, SEAM),
    "positions (w)": (lambda n, y, s, x: y + n.columns, SEAM),
    "positions (1, C, h, 1)": (lambda n, y, s, x: y + n.soft(n.stripes), SOFT),
    "positions in another dtype": (lambda n, y, s, x: y + n.soft(n.short), SOFT),
    "one number for each channel": (lambda n, y, s, x: y + n.scale, FREE),
    "one number for each channel (C, 1, 1)": (lambda n, y, s, x: n.bounds + y, FREE),
    "one number for each channel that is computed": (
        lambda n, y, s, x: y + n.soft(n.gate(x.mean((2, 3)))[:, :, None, None]),
        SOFT,
    ),
    "a factor for each channel": (lambda n, y, s, x: y * n.scale, FREE),
    "a factor for each channel that is computed": (
        lambda n, y, s, x: y * n.gate(x.mean((2, 3)))[:, :, None, None],
        SEAM,
    ),
    "a factor for each channel, in place": (lambda n, y, s, x: operator.imul(y, n.scale), FREE),
    "a quotient for each channel": (lambda n, y, s, x: n.scale / (y * y + 1), FREE),
    "a number of the network": (lambda n, y, s, x: y + n.number, FREE),
    "a number of the network (1)": (lambda n, y, s, x: y * n.single - n.single, FREE),
    "a number that is computed": (lambda n, y, s, x: y + x.mean(), SEAM),
    "a size": (lambda n, y, s, x: y + x.shape[2], SEAM),
    "a size, as a factor": (lambda n, y, s, x: y / x.size(1), SEAM),
    "a number": (lambda n, y, s, x: 2 - y * 3, FREE),
    "a mask of one channel": (lambda n, y, s, x: y * n.one(x).sigmoid(), SEAM),
    "a mask of all channels": (lambda n, y, s, x: y * s.sigmoid(), SEAM),
    "a mask without channels": (lambda n, y, s, x: y * (x[:, :1] > 0), SEAM),
    "a mask (h, w)": (lambda n, y, s, x: y * n.mask, SEAM),
    "a mask that fills": (lambda n, y, s, x: y.masked_fill(x[:, :1] > 0, 0.5), SEAM),
    "one of two": (lambda n, y, s, x: torch.where(x[:, :1] > 0, y, s), SEAM),
    "the greater one": (lambda n, y, s, x: torch.maximum(y, s), SEAM),
    "bounds": (lambda n, y, s, x: y.clamp(-0.2, 0.3), FREE),
    "bounds by channel": (lambda n, y, s, x: torch.clamp(y, min=n.scale - 1), FREE),
    "bounds that tracing computes": (lambda n, y, s, x: torch.clamp(y, min=n.bounds - 1), LOCAL),
    "bounds by channel that are stored": (lambda n, y, s, x: y.clamp(max=n.bounds), FREE),
    "bounds by channel, by name": (lambda n, y, s, x: torch.clamp(max=n.scale, input=y), FREE),
    "bounds by channel, in place": (
        lambda n, y, s, x: y.clamp_(max=n.bounds),
        FREE,
    ),
    "bounds by pixel": (lambda n, y, s, x: y.clamp(max=n.positions), SEAM),
    "bounds that are a map": (lambda n, y, s, x: torch.clamp(y, max=s), SEAM),
    "a plain map bounded by an octave one": (lambda n, y, s, x: torch.clamp(s, max=y), SEAM),
    "its own means": (_fine, SOFT),
    "its own means over one axis": (lambda n, y, s, x: y + n.soft(y.mean(2, keepdim=True)), BOTH),
    "a column of itself": (lambda n, y, s, x: y + n.soft(y.mean((2, 3))[:, :, None, None]), SOFT),
    "its largest pixels": (lambda n, y, s, x: F.max_pool2d(y, 3, 1, 1, return_indices=True)[0], LOCAL),
    "a pooling of torch's own": (lambda n, y, s, x: torch.max_pool2d(y, 3, 1, 1), FREE),
    "a head of one channel, to which more are added": (_broadcast_head, FREE),
    "beside a product that broadcasts": (_two_channels, FREE),
}


def _network(meet: Callable[..., Tensor]) -> Meets:
    torch.manual_seed(0)
    return Meets(meet).eval()


def _by_hand(net: Meets, plan: surgeon.Plan) -> Meets:
    """The network with every conv splitting and joining for itself; the rest is its own Python."""
    local = copy.deepcopy(net)
    operate.place_(local, operate.prepare(local, plan), Network(net, called_with=plan.inputs))
    local.low = ((C // 2, C),) if plan.low_passed else ()
    return local


@pytest.mark.parametrize("name", STEPS)
def test_it_goes_through_the_streams_or_there_is_a_seam(name: str) -> None:
    meet, outcome = STEPS[name]
    net, x = _network(meet), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    plan = surgeon.plan(net, RECIPE, SHAPE)
    converted = surgeon.convert(net, plan)
    fused = surgeon.fuse(converted)
    local = _by_hand(net, plan)
    with torch.no_grad():
        expected = local(x.clone())
        assert relative(converted(x.clone()), expected) < 1e-6
        assert relative(fused(x.clone()), expected) < 1e-5
        assert relative(fused(x.clone().requires_grad_()), expected) < 1e-5
        assert relative(net(x.clone()), expected) > 1e-3  # so there was something to compare
    assert relative(fused(x.clone()), expected) < 1e-5  # with gradients nothing is added in place
    assert (isinstance(converted, Rewritten)) == (outcome != LOCAL), plan.seams
    assert bool(plan.low_passed) == (outcome in (SOFT, BOTH))
    joins = [seam for seam in plan.seams if seam.kind == "join"]
    assert bool(joins) == (outcome in (SEAM, BOTH)), plan.seams
    assert surgeon.verify(converted, fused).equivalent


@pytest.mark.parametrize("name", [name for name, (_, outcome) in STEPS.items() if outcome in (FREE, SOFT)])
def test_it_trains_as_it_would_by_hand(name: str) -> None:
    net, x = _network(STEPS[name][0]), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    plan = surgeon.plan(net, RECIPE, SHAPE)
    converted, local = surgeon.convert(net, plan).train(), _by_hand(net, plan).train()
    for one in (converted, local):
        one(x.clone()).square().mean().backward()
    for (key, parameter), other in zip(local.named_parameters(), converted.parameters(), strict=True):
        if parameter.grad is not None:
            assert relative(other.grad, parameter.grad) < 1e-4, key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)),
        (torch.ones(2, 1, 4, 4), torch.ones(2, 3, 4, 4)),
        (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4, 4)),
        (torch.ones(2, 3, 4, 1), torch.ones(3, 1, 4)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.float64)),
        (torch.ones(2, 3, 4, 4, dtype=torch.float16), torch.ones(2, 3, 4, 4)),
        (torch.ones(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(())),
    ],
    ids=lambda one: f"{tuple(one.shape)} {one.dtype}",
)
def test_a_sum_that_may_be_in_place_has_the_shape_and_dtype_of_the_sum(one: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        made, expected = streams.add_into(one.clone(), other), one + other
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(made, expected)
