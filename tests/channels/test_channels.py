"""Orders of channels: which axes have to be permuted together, and that a network then computes exactly the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from helpers import relative, shake_
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.analysis.network import Network
from surgeon.blocks import norms
from surgeon.channels.follow import Group, channels_of
from surgeon.channels.orders import Order, Segment, cut, fix, flat, length, unite
from surgeon.models.call import Inputs
from surgeon.surgery.permute import Permuted, permute_

REAL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 2880),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10), 192),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=10), 10944),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10), 4144),
    "resnext": (lambda: torchvision.models.resnext50_32x4d(num_classes=10), 19008),
    "res2net, whose parts are split and joined": (lambda: timm.create_model("res2net50_14w_8s", num_classes=10), 12598),
    "regnety, with squeeze and excite and groups": (lambda: timm.create_model("regnety_002", num_classes=10), 7892),
}


def free(model: nn.Module, x: Tensor) -> list[Group]:
    return [group for group in channels_of(Network(model, Inputs((x,)))).groups if not group.fixed and group.size > 1]


def shuffled(group: Group) -> Permuted:
    return Permuted.of(group, torch.randperm(group.size).tolist())


@pytest.mark.parametrize("kind", REAL)
def test_a_real_network_with_all_its_free_orders_permuted_computes_the_same(kind: str) -> None:
    make, channels = REAL[kind]
    torch.manual_seed(0)
    model = shake_(make(), gently=True).double().eval()
    found = free(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert sum(group.size for group in found) == channels
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        undo = permute_(model, [shuffled(group) for group in found])
        assert relative(model(x), before) <= 1e-12
        undo()
        assert torch.equal(model(x), before)


class Net(nn.Module):
    """Parts by name, and a forward that is a function of them and of the input."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.step = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def conv(c_in: int = 8, c_out: int = 8, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups)


def gate(c: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.SiLU(), nn.Conv2d(4, c, 1), nn.Sigmoid())


def squeezed(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.b(x * net.fc(x.mean((2, 3))).sigmoid()[:, :, None, None])


def weighed(net: Net, x: Tensor) -> Tensor:
    both = torch.stack([net.a(x), net.c(x)], 1)
    return net.b((both.softmax(1) * both).sum(1))


# name → network, its orders that are free, by their sizes.
SMALL: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "a sum": (lambda: Net(lambda n, x: n.c(n.a(x) + n.b(x)), a=conv(), b=conv(), c=conv()), [8]),
    "a concatenation": (
        lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(), b=conv(8, 4), c=conv(12)),
        [4, 8],
    ),
    "a slice": (lambda: Net(lambda n, x: n.b(n.a(x)[:, 2:6]), a=conv(), b=conv(4)), [2, 2, 4]),
    "weights of its own for two maps": (
        lambda: Net(
            lambda n, x: n.b((torch.stack([n.a(x), n.a(x).relu()], 1) * F.softmax(n.w, 0)).sum(1)),
            a=conv(),
            b=conv(),
            w=nn.Parameter(torch.rand(2, 1, 1, 1)),
        ),
        [8],
    ),
    "two maps, weighed for each channel": (lambda: Net(weighed, a=conv(), b=conv(), c=conv()), [8]),
    "a linear step": (
        lambda: Net(
            lambda n, x: F.linear(F.linear(n.a(x).mean((2, 3)), n.w, n.v).relu(), n.u),
            a=conv(),
            w=nn.Parameter(torch.rand(6, 8)),
            v=nn.Parameter(torch.rand(6)),
            u=nn.Parameter(torch.rand(3, 6)),
        ),
        [6, 8],
    ),
    "halves that change places": (
        lambda: Net(lambda n, x: n.b(torch.cat(torch.split(n.a(x), 4, 1)[::-1], 1)), a=conv(), b=conv()),
        [4, 4],
    ),
    "two halves, added": (
        lambda: Net(lambda n, x: n.b(n.a(x)[:, :4] + n.a(x)[:, 4:]), a=conv(), b=conv(4)),
        [4],
    ),
    "groups": (lambda: nn.Sequential(conv(), conv(groups=2), conv()), [4, 4, 4, 4]),
    "depthwise": (lambda: nn.Sequential(conv(), conv(groups=8), nn.PReLU(8), conv()), [8]),
    "depthwise, two filters for a channel": (lambda: nn.Sequential(conv(), conv(8, 16, groups=8), conv(16)), [8]),
    "flattened": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)), [8]),
    "a view by its sizes": (
        lambda: Net(
            lambda n, x: n.fc(F.adaptive_avg_pool2d(n.a(x), 2).view(x.size(0), -1)), a=conv(), fc=nn.Linear(32, 5)
        ),
        [8],
    ),
    "squeeze and excite": (lambda: Net(squeezed, a=conv(), fc=nn.Linear(8, 8), b=conv()), [8]),
    "gated by convs": (
        lambda: Net(lambda n, x: n.b(n.a(x) * n.g(n.a(x))), a=conv(), g=gate(), b=conv()),
        [4, 8],
    ),
    "a scale of its own": (
        lambda: Net(
            lambda n, x: n.b(n.a(x) * n.s + n.t.view(1, -1, 1, 1)),
            a=conv(),
            b=conv(),
            s=nn.Parameter(torch.rand(8, 1, 1)),
            t=nn.Parameter(torch.rand(8)),
        ),
        [8],
    ),
    "a map of its own": (
        lambda: Net(lambda n, x: n.b(n.a(x) + n.p), a=conv(), b=conv(), p=nn.Parameter(torch.rand(1, 8, 6, 6))),
        [8],
    ),
    "one conv, called twice": (lambda: Net(lambda n, x: n.b(n.a(n.a(x))), a=conv(), b=conv()), []),
    "one conv, called twice within": (
        lambda: Net(lambda n, x: n.b(n.a(n.a(n.s(x)).relu())), s=conv(), a=conv(), b=conv()),
        [8],
    ),
    "norms over groups": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 8), nn.ReLU(), conv()), [4, 4]),
    "a norm over the last axis": (
        lambda: Net(
            lambda n, x: n.b(n.n(n.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=conv(), n=nn.LayerNorm(8), b=conv()
        ),
        [8],
    ),
    "a transposed conv": (lambda: nn.Sequential(conv(), nn.ConvTranspose2d(8, 6, 2, 2), conv(6)), [6, 8]),
    "a mean over rows": (lambda: Net(lambda n, x: n.f(n.a(x).mean(3).mean(2)), a=conv(), f=nn.Linear(8, 3)), [8]),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_step_lets_through_the_orders_that_it_can(kind: str) -> None:
    make, sizes = SMALL[kind]
    torch.manual_seed(0)
    model = shake_(make()).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    found = free(model, x[:1])
    assert sorted(group.size for group in found) == sizes
    with torch.no_grad():
        before = model(x)
        for group in found:
            permute_(model, [shuffled(group)])
        assert relative(model(x), before) <= 1e-12


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "channel shuffle": (
        lambda: Net(
            lambda n, x: n.b(n.a(x).view(x.size(0), 2, 4, 6, 6).transpose(1, 2).reshape(x.size())), a=conv(), b=conv()
        ),
        r"view\(x.size\(0\), 2, 4, 6, 6\).* is a step that channels cannot be followed through",
    ),
    "pixel shuffle": (lambda: nn.Sequential(conv(), nn.PixelShuffle(2), conv(2)), "PixelShuffle.* cannot be followed"),
    "a softmax over channels": (lambda: nn.Sequential(conv(), nn.Softmax(1), conv()), "Softmax.* cannot be followed"),
    "a norm across channels": (lambda: nn.Sequential(conv(), nn.LocalResponseNorm(3), conv()), "LocalResponseNorm"),
    "an output": (lambda: Net(lambda n, x: (n.a(x), n.b(n.a(x))), a=conv(), b=conv()), "it is what the network gives"),
    "every second channel": (lambda: Net(lambda n, x: n.b(n.a(x)[:, ::2]), a=conv(), b=conv(4)), "cannot be followed"),
    "a weight that is read": (
        lambda: Net(lambda n, x: n.b(n.a(x)) * n.b.weight.mean() + n.a.weight.flatten()[0], a=conv(), b=conv()),
        "cannot be followed through",
    ),
    "a weight that is computed": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), conv()),
        "cannot be followed",
    ),
    "a sum with the input": (
        lambda: Net(lambda n, x: n.b(n.a(x) + x), a=conv(), b=conv()),
        "what the network is given",
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_cannot_be_followed_keeps_its_order_and_says_why(kind: str) -> None:
    make, why = KEPT[kind]
    model, x = make(), torch.randn(2, 8, 6, 6)
    channels = channels_of(Network(model, Inputs((x,))))
    parts = dict(model.named_modules())
    weight = parts.get("a", parts.get("0")).weight
    reasons = {group.fixed for group, _, _ in channels.on(weight, 0)} or {"its channels cannot be followed"}
    assert len(reasons) == 1
    [reason] = reasons
    assert reason is not None
    assert re.search(why, reason), reason


def test_hooks_and_modules_that_are_kept_elsewhere_keep_their_order() -> None:
    hooked = nn.Sequential(conv(), nn.ReLU(), conv())
    hooked[0].register_forward_hook(lambda *_: None)
    assert not free(hooked, torch.zeros(1, 8, 6, 6))
    kept = nn.Sequential(conv(), nn.ReLU(), conv())
    kept.aside = [kept[0]]
    assert not free(kept, torch.zeros(1, 8, 6, 6))
    unstored = Net(lambda n, x: n.b(n.a(x) * n.s), a=conv(), b=conv())
    unstored.register_buffer("s", torch.rand(8, 1, 1), persistent=False)
    assert not free(unstored, torch.zeros(1, 8, 6, 6))  # weights alone would not bring its order along
    tied = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    tied[4].weight = nn.Parameter(tied[0].weight.data)  # the same memory, which a permutation would take apart
    assert [place.names for group in free(tied, torch.zeros(1, 8, 6, 6)) for place in group.places] == []


class Branches(nn.Module):
    """A forward that tracing cannot follow, around parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv())
        self.second = nn.Sequential(conv(), nn.ReLU(), conv())
        self.third = nn.Sequential(conv(), nn.ReLU(), conv())
        self.lone = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.mean() > -1e9:
            x = self.lone(self.second(x))
        return self.third(x) * self.third[0].weight[0, 0, 0, 0] + self.second[0].bias[:, None, None]


def test_inside_code_that_is_not_traced_only_the_insides_of_its_parts_are_free() -> None:
    torch.manual_seed(0)
    model = shake_(Branches()).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    found = free(model, x)
    assert [{name for place in group.places for name in place.names} for group in found] == [
        {"first.0.weight", "first.0.bias", "first.3.weight", *(f"first.1.{name}" for name in norms.TENSORS)}
    ]
    with torch.no_grad():
        before = model(x)
        permute_(model, [shuffled(group) for group in found])
        assert relative(model(x), before) <= 1e-12


def test_leaving_out_one_tensor_of_an_order_is_seen() -> None:
    torch.manual_seed(0)
    model = shake_(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv())).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    [group] = free(model, x)
    whole = shuffled(group)
    assert len(whole.tensors) == 7
    for i in range(7):
        part = whole.model_copy(update={"tensors": whole.tensors[:i] + whole.tensors[i + 1 :]})
        with torch.no_grad():
            before = model(x)
            undo = permute_(model, [part])
            assert relative(model(x), before) > 1e-3
            undo()


def test_orders_are_cut_united_and_fixed_wherever_they_lie() -> None:
    a, b = [Segment(Order(6))], [Segment(Order(2)), Segment(Order(4))]
    part = cut(a, 1, 3)
    unite(a, b)
    assert [one.length for one in flat(a)] == [1, 1, 1, 3]
    assert flat(a) == flat(b)
    assert part is not None
    fix(part, "why")
    assert [one.order.fixed for one in flat(b)] == [None, "why", "why", None]
    unite(long := [Segment(Order(4), 3)], fine := [Segment(Order(12))])
    assert flat(long) == flat(fine)
    assert cut(fine, 0, 4) is None  # it would cut a channel
    assert flat(fine)[0].order.fixed
    unite(a, [Segment(Order(5))])
    assert length(a) == 6
    assert all(one.order.fixed for one in flat(a))
