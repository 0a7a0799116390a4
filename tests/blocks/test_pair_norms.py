"""Batch norms of two streams, of every class, in both modes: what each channel gets is what it gets in one map."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import relative, shake_
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import surgeon
from surgeon.blocks.pairs import PairFrozenNorm, PairNorm, PairRest, PairSyncNorm, make_pair_norm_, pair_kind
from surgeon.conv.streams import Ranges, join, split

EXACT = 1e-12
LAST, SCATTERED = ((4, 6),), ((1, 2), (4, 6))


def synchronised_act(channels: int) -> nn.Module:
    norm = SyncBatchNormAct(channels)
    norm.drop, norm.act = nn.Identity(), nn.SiLU()
    return norm


KINDS: dict[str, tuple[Callable[[int], nn.Module], type]] = {
    "torch's": (lambda c: nn.BatchNorm2d(c, momentum=None), PairNorm),
    "timm's": (lambda c: BatchNormAct2d(c, act_layer="silu"), PairNorm),
    "synchronised": (lambda c: nn.SyncBatchNorm(c, momentum=None), PairSyncNorm),
    "synchronised, without affine": (lambda c: nn.SyncBatchNorm(c, affine=False), PairSyncNorm),
    "timm's, synchronised": (synchronised_act, PairSyncNorm),
    "frozen": (FrozenBatchNorm2d, PairFrozenNorm),
    "timm's, frozen": (FrozenBatchNormAct2d, PairFrozenNorm),
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("low", [LAST, SCATTERED], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_get_what_one_map_gets(kind: str, low: Ranges) -> None:
    make, expected_kind = KINDS[kind]
    torch.manual_seed(0)
    plain = shake_(make(6)).double()
    pair = copy.deepcopy(plain)
    undo = make_pair_norm_(pair, low)
    assert type(pair) is expected_kind
    assert pair.state_dict().keys() == plain.state_dict().keys()
    x = join(*split(noise(3, 6, 8, 8), low), low)  # its low channels are the same at four pixels
    for training in (False, True, True, False):
        expected, (high, small) = plain.train(training)(x), pair.train(training)(split(x, low))
        assert relative(join(high, small, low), expected) <= EXACT or not training
        assert torch.equal(pair.eval()(x), pair(x))
        for name, tensor in plain.state_dict().items():
            if name != "running_var":  # torch corrects it by n/(n−1), and n is a quarter
                assert relative(pair.state_dict()[name], tensor) <= EXACT, name
    plain.load_state_dict(pair.state_dict())
    assert relative(join(*pair(split(x, low)), low), plain.eval()(x)) <= EXACT
    undo()
    assert type(pair) is type(plain)
    assert vars(pair).keys() == vars(plain).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_both_streams(kind: str) -> None:
    torch.manual_seed(0)
    plain = shake_(KINDS[kind][0](6)).double().train()
    pair = copy.deepcopy(plain)
    make_pair_norm_(pair, SCATTERED)
    x, weights = join(*split(noise(3, 6, 8, 8), SCATTERED), SCATTERED), noise(3, 6, 8, 8)
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    (plain(given[0]) * weights).sum().backward()
    (join(*pair(split(given[1], SCATTERED)), SCATTERED) * weights).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), pair.parameters(), strict=True):
        assert relative(other.grad, one.grad) <= 1e-10, name


def test_what_its_class_does_in_train_mode_has_to_be_known() -> None:
    assert pair_kind(SplitBatchNorm2d(8, num_splits=2)) is None
    assert pair_kind(nn.BatchNorm1d(8)) is None
    assert pair_kind(nn.GroupNorm(2, 8)) is None


@pytest.mark.parametrize("kind", ["timm's", "timm's, frozen", "frozen"])
def test_a_network_of_them_is_converted_trained_saved_fused_and_verified(kind: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    make = KINDS[kind][0]
    convs = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)]
    net = shake_(nn.Sequential(convs[0], make(8), convs[1], make(8), convs[2], make(8), convs[3])).eval()
    rule = {"swap": "octave", "with": {"min_size": 1}}
    model = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [rule]}, (2, 8, 16, 16))
    kinds = [type(model.get_submodule(path)) for path in ("1", "3", "5")]
    assert kinds == [KINDS[kind][1]] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(noise(4, 8, 16, 16).float()).square().mean().backward()
    optimizer.step()
    model.eval()
    surgeon.save(model, f"{tmp_path}/octave.pt")
    loaded = surgeon.load(f"{tmp_path}/octave.pt")
    x = noise(2, 8, 16, 16).float()
    assert torch.equal(loaded(x), model(x))
    fused = surgeon.fuse(loaded)
    assert {type(fused.get_submodule(path)) for path in ("1", "3", "5")} <= {PairRest, nn.Sequential, nn.Identity}
    assert surgeon.verify(loaded, fused, (2, 8, 16, 16)).equivalent
    del fused.surgeon_provenance
    assert surgeon.verify(loaded, fused, (2, 8, 16, 16)).equivalent
    exact = [copy.deepcopy(one).double()(x.double()) for one in (loaded, surgeon.fuse(copy.deepcopy(loaded).double()))]
    assert relative(exact[1], exact[0]) <= EXACT
