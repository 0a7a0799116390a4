"""What a run writes, counted by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import narrow_torchvision
from torch import nn

import surgeon
from surgeon.models.cost import measure


def test_what_is_changed_in_place_or_only_viewed_is_not_written_anew() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 5))
    assert measure(net, [torch.empty(2, 3, 8, 8)]).activations == 4 * (2 * 8 * 36 + 2 * 5)
    net[1] = nn.ReLU()
    assert measure(net, [torch.empty(2, 3, 8, 8)]).activations == 4 * (2 * 2 * 8 * 36 + 2 * 5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_models_dtype(dtype: torch.dtype, size: int) -> None:
    conv = nn.Conv2d(3, 4, 1).to(dtype)
    assert measure(conv, [torch.empty(1, 3, 5, 5)]).activations == size * 4 * 25


def test_a_whole_network_writes_what_its_layers_return() -> None:
    """VGG-11: convs, poolings with their indices, the classifier. ReLUs work in place, and dropouts not at all."""
    net = narrow_torchvision("vgg11").eval()
    x, written = torch.zeros(1, 3, 64, 64), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, args, out: written.append(4 * out.numel()))
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _, args, out: written.append((4 + 8) * out.numel()))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda _, args, out: written.append(4 * out.numel()))
    with torch.no_grad():
        net(x)
    expected = sum(written)
    assert measure(narrow_torchvision("vgg11"), [x]).activations == expected


@pytest.mark.parametrize("recipe", ["acnet", "hetconv-p4"])
def test_what_a_plan_promises_is_what_the_converted_network_costs(recipe: str) -> None:
    net = narrow_torchvision("resnet18")
    plan = surgeon.plan(net, recipe, (1, 3, 64, 64))
    before = measure(net, [torch.empty(1, 3, 64, 64)])
    after = measure(surgeon.convert(net, plan), [torch.empty(1, 3, 64, 64)])
    for name in ("params", "macs", "activations"):
        change = getattr(plan.total, name)
        assert (change.before, change.after) == (getattr(before, name), getattr(after, name))


def test_what_is_called_twice_computes_and_writes_twice_and_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    net, x = Twice(), torch.empty(1, 4, 8, 8)
    assert measure(net.conv, [x]).times(2) == measure(net, [x])
    assert measure(net.conv, [x]).macs * 2 == measure(net, [x]).macs > 0


class _Token(nn.Module):
    """Hands a view of a parameter to one of its modules, as transformers do with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(3, 8, 3), _Add()
        self.token = nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add((self.conv(x), self.token.expand(2, -1, -1, -1)))


class _Add(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] + pair[1]


def test_a_network_that_hands_its_parameters_around_is_counted() -> None:
    net = _Token()
    assert measure(net, [torch.empty(1, 3, 8, 8)]).macs == 8 * 3 * 9 * 36
    assert net.token.requires_grad


def test_products_that_are_added_in_place_are_counted() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(2, 3).addmm_(x, torch.ones(4, 3)) + torch.ones(1, 2, 3).baddbmm_(
                x[None], x.new_ones(1, 4, 3)
            )

    assert measure(Adds(), [torch.ones(2, 4)]).macs == 2 * 2 * 4 * 3
