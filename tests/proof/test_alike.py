"""Modules are certainly the same only where everything that decides what they compute can be compared to the end."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from surgeon.proof.alike import is_alike, is_filled_in, unlike


class _Own(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv, self.act, self.sizes = nn.Conv2d(3, 4, 3), act, {"low": [1, 2.0]}
        self.register_buffer("scale", torch.ones(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) * self.scale


class _Opaque:
    """An object that nobody can look into."""


def _hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return out * 2


def _scaled_by(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def _tap(net: nn.Sequential) -> None:
    net[0].conv.weight.data[0, 0, 0, 0] += 1e-6


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "0.conv stride": lambda net: setattr(net[0].conv, "stride", (2, 2)),
    "0.conv hook": lambda net: net[0].conv.register_forward_hook(_hook),
    "0.conv forward": lambda net: setattr(net[0].conv, "forward", torch.relu),
    "0 value": lambda net: net[0].sizes["low"].__setitem__(1, 2.5),
    "0 function": lambda net: setattr(net[0], "act", torch.sigmoid),
    "0 partial": lambda net: setattr(net[0], "act", functools.partial(torch.clamp, min=0)),
    "0 object": lambda net: setattr(net[0], "extra", _Opaque()),
    "1 class": lambda net: net.__setitem__(1, nn.ReLU6()),
    "1 mode": lambda net: net[1].train(),
    "2 eps": lambda net: setattr(net[2], "eps", 2e-5),
    " order": lambda net: net.append(nn.Identity()),
}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(_Own(), nn.ReLU(), nn.BatchNorm2d(4)).eval()


def test_a_copy_is_the_same() -> None:
    net = _net()
    assert unlike(net, copy.deepcopy(net), with_tensors=True) == []
    assert is_alike([net[0], net[2]], [copy.deepcopy(net[0]), copy.deepcopy(net[2])])
    assert not is_alike([net[0]], [net[0], net[2]])


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_different_or_cannot_be_seen_is_named(change: str) -> None:
    net, other = _net(), _net()
    CHANGES[change](other)
    assert unlike(net, other, with_tensors=False) == [change.split(" ")[0]]


def test_functions_of_equal_code_differ_in_what_they_hold() -> None:
    net, same, other = (nn.Sequential(_Own(_scaled_by(factor))) for factor in (2.0, 2.0, 3.0))
    assert unlike(net, same, with_tensors=False) == []
    assert unlike(net, other, with_tensors=False) == ["0"]


def test_tensors_are_compared_bit_by_bit() -> None:
    net, other, signed = _net(), _net(), _net()
    _tap(other)
    assert unlike(net, other, with_tensors=False) == []
    assert unlike(net, other, with_tensors=True) == ["0.conv"]
    signed[2].running_mean.neg_()  # −0 divides to −Inf
    assert unlike(net, signed, with_tensors=True) == ["2"]


def test_a_shared_module_is_no_module_of_its_own() -> None:
    conv = nn.Conv2d(3, 3, 1)
    twice, apart = nn.Sequential(conv, conv), nn.Sequential(conv, copy.deepcopy(conv))
    assert unlike(twice, copy.deepcopy(twice), with_tensors=True) == []
    assert unlike(twice, apart, with_tensors=True) is None


def test_graphs_are_compared_by_their_code() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    one, same = fx.symbolic_trace(net), fx.symbolic_trace(copy.deepcopy(net))
    assert unlike(one, same, with_tensors=True) == []
    other = fx.symbolic_trace(net)
    output = next(node for node in other.graph.nodes if node.op == "output")
    with other.graph.inserting_before(output):
        output.args = (other.graph.call_function(torch.neg, (output.args[0],)),)
    other.recompile()
    assert unlike(one, other, with_tensors=True) == [""]


def test_a_model_is_filled_in_if_shapes_and_buffers_that_are_not_stored_fit() -> None:
    net, other, wide, buffer = _net(), _net(), _net(), _net()
    _tap(other)
    assert is_filled_in(net, other)
    wide[0].conv.weight = nn.Parameter(torch.zeros(4, 3, 5, 5))
    assert not is_filled_in(net, wide)
    buffer[0].scale.fill_(2)
    assert not is_filled_in(net, buffer)
