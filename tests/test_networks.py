"""Real networks through the whole path, from file to file, with shaken norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers import narrow, narrow_torchvision, on_meta, relative, run_surgeon, shake_
from small_networks import small_densenet
from torch import Tensor, nn

import surgeon


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    side: int  # of the input; small, to be quick
    takes_all_norms: bool = False
    train_side: int | None = None  # where training needs a larger input


def _full(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None)


def _narrow(name: str, **args: object) -> Callable[[], nn.Module]:
    """All layers, wired as they are, with a quarter of the channels."""
    return lambda: narrow_torchvision(name, **args)


NETS = {
    "resnet18": Net(_narrow("resnet18"), 64, takes_all_norms=True),
    "resnet50": Net(_full("resnet50"), 64, takes_all_norms=True),
    "vgg16": Net(_narrow("vgg16"), 32),
    "vgg16_bn": Net(_narrow("vgg16_bn"), 32, takes_all_norms=True),
    "alexnet": Net(_narrow("alexnet"), 80),
    "densenet": Net(small_densenet, 64),
    "mobilenet_v3_large": Net(_narrow("mobilenet_v3_large"), 64, takes_all_norms=True),
    "inception_v3": Net(_narrow("inception_v3", init_weights=False), 128, takes_all_norms=True, train_side=299),
    "timm vgg11": Net(lambda: narrow(on_meta(lambda: timm.create_model("vgg11", mlp_ratio=0.125))), 64),
    "timm resnet50_clip": Net(lambda: timm.create_model("resnet50_clip", img_size=64, width_factor=0.25), 64),
}
IN_BFLOAT16 = ("resnet18", "vgg16", "vgg16_bn", "mobilenet_v3_large", "timm resnet50_clip")
NORMED = [name for name, net in NETS.items() if net.takes_all_norms]


def _made(net: Net, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = net.build()
    shake_(model, seed=1, gently=True)
    return model.to(dtype)


def _chain(model: nn.Module, net: Net, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Save, convert and fuse a model by the command line; after each step its file before and after.

    No more than two files are there at once.
    """
    original, converted, fused = (folder / name for name in ("net.pt", "net.acnet.pt", "net.acnet.fused.pt"))
    torch.save(model, original)
    shape = f"--input=1,3,{net.side},{net.side}"
    assert run_surgeon("convert", original, "--recipe", "acnet", shape) == 0
    yield original, converted
    original.unlink()
    assert run_surgeon("fuse", converted, shape) == 0
    yield converted, fused
    converted.unlink()
    fused.unlink()


def _evaluated(model: nn.Module, side: int) -> Tensor:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", NETS)
def test_in_float64_conversion_and_folding_keep_the_function(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    original = _made(net, torch.float64)
    converted, fused = (surgeon.load(after) for _, after in _chain(original, net, tmp_path))

    before, after, folded = (_evaluated(model, net.side) for model in (original, converted, fused))
    assert relative(after, before) <= 1e-12
    assert relative(folded, after) <= 1e-12

    blocks = [m for m in converted.modules() if isinstance(m, surgeon.ACBlock)]
    assert blocks
    assert not any(isinstance(m, surgeon.ACBlock) for m in fused.modules())
    assert type(converted) is type(fused) is type(original)
    square = sum(
        m.kernel_size in ((3, 3), (5, 5), (3, 5), (5, 3)) for m in original.modules() if isinstance(m, nn.Conv2d)
    )
    assert len(blocks) == square  # every conv that the recipe asks for
    if net.takes_all_norms:
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == (
            sum(isinstance(m, nn.BatchNorm2d) for m in original.modules()) - len(blocks)
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NETS), *((name, torch.bfloat16) for name in IN_BFLOAT16)],
    ids=str,
)
def test_in_the_stored_dtype_verify_passes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = NETS[name]
    for before, after in _chain(_made(net, dtype), net, tmp_path):
        assert run_surgeon("verify", before, after) == 0


@pytest.mark.parametrize("name", NORMED)
def test_where_every_norm_was_taken_over_training_starts_the_same(name: str) -> None:
    net = NETS[name]
    side = net.train_side or net.side
    original = _made(net, torch.float64)
    converted = surgeon.convert(original, "acnet", (1, 3, side, side))
    plan = surgeon.plan(original, "acnet", (1, 3, side, side))
    assert all(entry.takes_norm for entry in plan.swaps)

    ours, theirs = _trained_step(original, side), _trained_step(converted, side)
    assert relative(theirs, ours) <= 1e-9
    names = {
        **{f"{e.path}.weight": f"{e.path}.square_conv.weight" for e in plan.swaps},
        **{f"{e.takes_norm[0]}.weight": f"{e.path}.square_bn.weight" for e in plan.swaps},
        **{f"{e.takes_norm[0]}.bias": f"{e.path}.square_bn.bias" for e in plan.swaps},
    }
    compared = dict(converted.named_parameters())
    gone = {f"{e.path}.bias" for e in plan.swaps}  # a conv's bias goes into the running mean; training never saw it
    for key, parameter in original.named_parameters():
        if key in gone:
            continue
        twin = compared[names.get(key, key)]
        assert parameter.grad is not None
        assert relative(twin.grad, parameter.grad) <= 1e-9, key


def _trained_step(model: nn.Module, side: int) -> Tensor:
    """One forward and backward in train mode, with the same dropout; the output."""
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.manual_seed(5)
    out = model.train()(x)
    logits = torch.cat(list(out)) if isinstance(out, tuple) else out
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (logits * target).sum().backward()
    return logits.detach()
