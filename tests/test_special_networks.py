"""Networks of kinds that libraries of classifiers do not have: planned, converted, trained, folded and reloaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import special
import torch
from helpers import narrow, on_meta, relative, shake_
from torch import Tensor, nn

import surgeon
from surgeon.blocks import Block


def segmentation() -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return narrow(on_meta(lambda: library.Unet("resnet18", encoder_weights=None, classes=2)))


@dataclass(frozen=True)
class Net:
    """A network, what must be claimed of it, and the words that must stand at some of its other convs."""

    build: Callable[[], nn.Module]
    side: int
    acnet: int  # convs that are swapped
    hetconv: int  # the dense ones of them whose channels can be cut into four
    takes: int  # norms that go into the ACBlocks
    stay: tuple[tuple[str, str], ...]  # a conv and why hetconv-p4 leaves it
    octave_stays: tuple[tuple[str, str], ...] = ()
    package: str = "special"


NETS = {
    "T2T-ViT": Net(special.T2TViT, 32, acnet=2, hetconv=1, takes=1, stay=(("patch2", "no rule"),)),
    "ConvNeXt and attention": Net(
        special.Hybrid, 32, acnet=2, hetconv=1, takes=1,
        stay=(("blocks.0.depthwise", "no rule"), ("stem.0", "no rule"), ("place", "no rule")),
        octave_stays=(("stem.0", "stride 4x4"), ("down.1", "kernel 2x2 has no centre")),
    ),
    "detector": Net(
        special.Detector, 64, acnet=22, hetconv=21, takes=22,
        stay=(("model.0.conv", "3 input and 8 output channels cannot be cut"), ("model.12.dfl.conv", "no rule")),
        octave_stays=(("model.12.dfl.conv", "alpha 0.5 of 1 output channels leaves none"),),
    ),
    "U-Net": Net(
        special.UNet, 32, acnet=13, hetconv=12, takes=12, stay=(("stem.0", "no rule"), ("head.0", "2 output")),
    ),
    "segmentation-models-pytorch": Net(
        segmentation, 32, acnet=27, hetconv=26, takes=26,
        stay=(("encoder.conv1", "no rule"), ("segmentation_head.0", "2 output")), package="segmentation_models_pytorch",
    ),
}  # fmt: skip
FIXED = {"alpha_in": 0.5, "alpha_out": 0.5}
RULE = {"swap": "octave", "match": {"stride": [1, 2, 4]}, "with": FIXED}
OCTAVES = {"surgeon": 1, "title": "Octaves", "rules": [RULE]}
HOW = {"acnet": "acnet", "hetconv": "hetconv-p4", "octave": OCTAVES}

every_net = pytest.mark.parametrize("name", NETS)
every_way = pytest.mark.parametrize("way", HOW)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build it with norms that do something, the same one every time."""
    torch.manual_seed(0)
    net = NETS[name].build()
    shake_(net, seed=1, gently=True)
    return net.to(dtype).eval()


def shape_of(name: str) -> tuple[int, ...]:
    return (2, 3, NETS[name].side, NETS[name].side)


def images(name: str) -> Tensor:
    return torch.randn(shape_of(name), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@functools.cache
def _converted_once(name: str, way: str) -> nn.Module:
    return surgeon.convert(made(name), HOW[way], shape_of(name))


def converted(name: str, way: str) -> nn.Module:
    return copy.deepcopy(_converted_once(name, way))


def tensors(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Sequence):
        for part in out:
            yield from tensors(part)


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a copy, so that what the network remembers of the run does not count."""
    with torch.no_grad():
        return list(tensors(copy.deepcopy(net)(x)))


def apart(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    ours, theirs = outputs(one, x), outputs(other, x)
    assert len(ours) == len(theirs) > 0
    return max(relative(b, a) for b, a in zip(ours, theirs, strict=True))


@every_way
@every_net
def test_every_conv_stands_in_the_plan_with_what_becomes_of_it(name: str, way: str):
    net, given = made(name), NETS[name]
    plan = surgeon.plan(net, HOW[way], shape_of(name))
    entries = {entry.path: entry for entry in plan.convs}
    assert set(entries) == {path for path, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert all(entry.skip for entry in plan.convs if entry.swap is None)
    if way == "acnet":
        asked = {p for p, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size in ((3, 3), (5, 5))}
        assert {entry.path for entry in plan.swaps} == asked
        assert len(plan.swaps) == given.acnet
        assert sum(bool(entry.takes_norm) for entry in plan.swaps) == given.takes
    elif way == "hetconv":
        assert len(plan.swaps) == given.hetconv
    else:
        assert plan.swaps
    stay = given.octave_stays if way == "octave" else given.stay if way == "hetconv" else ()
    for path, words in stay:
        assert words in str(entries[path].skip)


@every_net
def test_acblocks_keep_the_function_and_fold_away(name: str):
    net, x = made(name), images(name)
    blocks = converted(name, "acnet")
    fused = surgeon.fuse(blocks)
    assert type(fused) is type(net)
    assert not any(isinstance(module, Block) for module in fused.modules())
    assert apart(blocks, net, x) <= 1e-12
    assert apart(fused, net, x) <= 1e-12


@every_net
def test_trained_acblocks_fold_away_too(name: str):
    blocks, x = shake_(converted(name, "acnet"), seed=5, gently=True), images(name)
    assert apart(blocks, made(name), x) > 1e-3
    assert apart(surgeon.fuse(blocks), blocks, x) <= 1e-12


@every_net
def test_verify_says_so_in_float32(name: str):
    net = made(name, torch.float32)
    blocks = surgeon.convert(net, "acnet", shape_of(name))
    for one, other in ((net, blocks), (blocks, surgeon.fuse(blocks))):
        report = surgeon.verify(one, other, shape_of(name))
        assert report.equivalent, report


@pytest.mark.parametrize("way", ["hetconv", "octave"])
@every_net
def test_approximations_run_and_verify_says_what_they_are(name: str, way: str):
    net, x = made(name), images(name)
    other = converted(name, way)
    ours, theirs = outputs(other, x), outputs(net, x)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert all(t.isfinite().all() for t in ours)
    assert max(relative(b, a) for b, a in zip(ours, theirs, strict=True)) > 1e-3
    assert surgeon.verify(net, other, shape_of(name)).verdict == "approximate"


@every_way
@every_net
def test_it_trains(name: str, way: str):
    """All parameters of blocks get gradients; ACBlocks whose norms were all taken over begin as the network does."""
    net, blocks, x = made(name).train(), converted(name, way).train(), images(name)
    optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)
    for step in range(2):  # strips start at gamma 0, which is what moves first
        torch.manual_seed(6)
        out = list(tensors(blocks(x)))
        if way == "acnet" and step == 0 and NETS[name].takes == NETS[name].acnet:
            torch.manual_seed(6)
            assert all(relative(b, a) <= 1e-10 for a, b in zip(tensors(net(x)), out, strict=True))
        optimizer.zero_grad()
        sum(t.square().mean() for t in out).backward()
        optimizer.step()
    learnt = [p for module in blocks.modules() if isinstance(module, Block) for p in module.parameters()]
    assert learnt
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learnt)


@every_way
@every_net
def test_it_comes_back_from_its_file(name: str, way: str, tmp_path: Path):
    net, x = converted(name, way), images(name)
    file = tmp_path / "net.pt"
    surgeon.save(net, file)
    again = surgeon.load(file, allow=[NETS[name].package])
    assert type(again) is type(net)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, x), outputs(net, x), strict=True))


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.package == "special"])
def test_its_weights_come_back_into_the_network_that_is_named(name: str, tmp_path: Path):
    torch.manual_seed(0)
    net = shake_(NETS[name].build(), seed=1, gently=True).eval()
    blocks, x = surgeon.convert(net, "acnet", shape_of(name)), images(name).float()
    arch = f"{special.__file__}:{type(net).__name__}"
    for made_, file in ((blocks, "blocks.safetensors"), (surgeon.fuse(blocks), "fused.safetensors")):
        surgeon.save(made_, tmp_path / file, arch=arch)
        again = surgeon.load(tmp_path / file, arch=arch).eval()
        assert all(torch.equal(a, b) for a, b in zip(outputs(again, x), outputs(made_, x), strict=True))


def test_the_detector_gives_maps_while_it_trains_and_boxes_afterwards():
    """Its own test: what it is converted to is compared with something that works."""
    net, x = made("detector"), images("detector")
    maps = list(tensors(net.train()(x)))
    assert [tuple(m.shape) for m in maps] == [(2, 35, 16, 16), (2, 35, 8, 8)]
    boxes, *_ = outputs(net.eval(), x)
    assert tuple(boxes.shape) == (2, 7, 320)
    assert boxes[:, 4:].min() >= 0
    assert boxes[:, 4:].max() <= 1
    places, strides = net.model[12].places(maps)
    assert places[:, [0, 1, 16, 256]].tolist() == [[0.5, 1.5, 0.5, 0.5], [0.5, 0.5, 1.5, 0.5]]
    assert strides[0, [0, 256]].tolist() == [4, 8]
