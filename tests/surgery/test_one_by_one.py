"""Blocks of a large network are folded one by one: nothing fails half-way, and none is held beside its conv."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon
from surgeon.errors import PassError, PlanError
from surgeon.surgery import one_by_one

SHAPE = (1, 3, 8, 8)


@pytest.fixture(autouse=True)
def _every_network_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_by_one, "LARGE", 0)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    for c_in in (3, 4, 4):
        net.extend([nn.Conv2d(c_in, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()])
    return shake_(surgeon.convert(net, "acnet", SHAPE), 0, gently=True).eval()


def _at_once(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    with monkeypatch.context() as patch:
        patch.setattr(one_by_one, "LARGE", 2**60)
        return surgeon.fuse(net, SHAPE)


def test_it_gives_what_folding_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _net()
    expected = _at_once(net, monkeypatch)
    made = surgeon.fuse(net, SHAPE)
    assert [type(one) for one in made.modules()] == [type(one) for one in expected.modules()]
    for key, tensor in expected.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor)
    one, other = surgeon.history(made)[-1], surgeon.history(expected)[-1]
    assert one == other
    assert one.measured == other.measured
    assert surgeon.verify(net, made, SHAPE).equivalent
    assert not any(hooks for module in made.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))


def test_a_block_is_free_before_the_next_one_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _net()
    blocks = [weakref.ref(module) for module in net if isinstance(module, surgeon.ACBlock)]
    alive: list[int] = []
    fold = one_by_one.fold_alone

    def counting(block: nn.Module) -> nn.Conv2d:
        alive.append(sum(one() is not None for one in blocks))
        return fold(block)

    monkeypatch.setattr(one_by_one, "fold_alone", counting)
    gc.disable()
    try:
        surgeon.fuse_(net, SHAPE)
    finally:
        gc.enable()
    assert alive[-3:] == [3, 2, 1]


def test_a_shared_block_is_placed_under_all_its_names() -> None:
    net = _net()
    net.append(net[3])
    surgeon.fuse_(net, SHAPE)
    assert net[3] is net[-1]
    assert type(net[3]) is nn.Conv2d


def test_what_cannot_be_folded_leaves_the_network_as_it_was() -> None:
    net = _net()
    net[6].square_conv.weight.data.fill_(torch.nan)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PlanError, match="6 cannot be folded"):
        surgeon.fuse_(net, SHAPE)
    assert [type(module) for module in net[::3]] == [surgeon.ACBlock] * 3
    assert before.keys() == net.state_dict().keys()


class _Reads(nn.Module):
    """Reads the kernel of a conv, where there is one, beside calling it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv = block

    def forward(self, x: Tensor) -> Tensor:
        kernel = getattr(self.conv, "weight", None)
        return self.conv(x) if kernel is None else self.conv(x) + kernel.mean() * 1e-6


def test_a_network_that_reads_a_conv_without_calling_it_is_folded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(_Reads(_net()[0]), nn.ReLU())
    expected, made = _at_once(net, monkeypatch), surgeon.fuse(net, SHAPE)
    x = torch.randn(*SHAPE)
    assert torch.equal(made(x), expected(x))
    assert surgeon.history(made)[-1].measured == surgeon.history(expected)[-1].measured


def test_what_fails_only_while_they_are_placed_names_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = _net(), torch.randn(*SHAPE)
    out, fold = net(x), one_by_one.fold_alone
    last = net[6]

    def failing(block: nn.Module) -> nn.Conv2d:
        if block is last and type(net[3]) is nn.Conv2d:
            raise RuntimeError("no memory")
        return fold(block)

    monkeypatch.setattr(one_by_one, "fold_alone", failing)
    with pytest.raises(PassError, match="6 could be folded before, and now not: RuntimeError: no memory"):
        surgeon.fuse_(net, SHAPE)
    assert torch.allclose(net(x), out, atol=1e-5)  # two are folded, and it computes the same
    monkeypatch.setattr(one_by_one, "fold_alone", fold)
    assert type(surgeon.fuse_(net, SHAPE)[6]) is nn.Conv2d
