"""The online form against its branches run one by one, at the start, trained, folded, compiled, and in networks.

The reference never sums a kernel: every branch is convolved by itself, and its map is scaled.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import relative, run_surgeon, shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks import Block, registry
from surgeon.blocks.acblock import ACBlock, OnlineACBlock
from surgeon.blocks.dbb import DiverseBranch, OnlineDiverseBranch
from surgeon.blocks.online import Online
from surgeon.blocks.repvgg import OnlineRepVGG, RepVGG
from surgeon.conv.padding import PaddedConv2d
from surgeon.errors import CaptureError, PlanError

EXACT = 1e-12
SHAPE = (2, 3, 16, 16)
KINDS: dict[str, type[Block]] = {"acblock": ACBlock, "repvgg": RepVGG, "dbb": DiverseBranch}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias, stride 2": {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    "in groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 6},
    "rectangular": {"kernel_size": (3, 5), "padding": (0, 1), "stride": (1, 2)},
    "other channels": {"kernel_size": 3, "out_channels": 4},
    "dilated": {"kernel_size": (5, 3), "padding": 2, "dilation": (1, 2)},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular, replicated": {"kernel_size": 5, "padding": 2, "padding_mode": "replicate", "groups": 3},
    "pads its input": {"kernel_size": 3, "stride": 2, "pads_input": "same"},
}
NOT_DBB = ("dilated", "same", "reflect", "circular, replicated", "pads its input")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "acblock": [{}, {"placement": "border"}],
    "repvgg": [{}],
    "dbb": [{}, {"expansion": 3}],
}
CASES = [
    (kind, name, options)
    for kind, variants in OPTIONS.items()
    for name in GEOMETRIES
    for options in variants
    if kind != "dbb" or name not in NOT_DBB
]
every_case = pytest.mark.parametrize(("kind", "name", "options"), CASES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def conv_of(name: str) -> nn.Conv2d:
    how = {"out_channels": 6} | GEOMETRIES[name]
    torch.manual_seed(0)
    make = PaddedConv2d if "pads_input" in how else nn.Conv2d
    return make(6, how.pop("out_channels"), how.pop("kernel_size"), **how).double()


def block_of(kind: str, conv: nn.Conv2d, **options: object) -> Any:
    chosen = KINDS[kind].Options.model_validate({"form": "online", **options})
    assert KINDS[kind].refusal(surgeon.nn.ConvSpec.of(conv), None, chosen) is None
    return KINDS[kind].from_conv(conv, chosen, norm=None, generator=torch.Generator().manual_seed(0))


def shaken(block: Any) -> Any:
    """Give every kernel and scale a number that is none of a start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for one in block.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=one.dtype))
    return block


def branches(block: Any) -> list[Callable[[Tensor], Tensor]]:
    """The branches of a block on a map that was padded, each with a convolution of its own."""
    spec = block.spec
    how: dict[str, Any] = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    (kh, kw), (c_out, width) = spec.kernel, spec.weight_shape[:2]

    def alone(taps: Tensor, rows: slice, columns: slice) -> Callable[[Tensor], Tensor]:
        wide = torch.zeros(spec.weight_shape, dtype=taps.dtype)
        wide[:, :, rows, columns] = taps
        return lambda x: F.conv2d(x, wide, **how)

    def at(place: int) -> slice:
        return slice(place, place + 1)

    everywhere, centre = slice(None), (at(kh // 2), at(kw // 2))
    found = [alone(block.conv_weight, everywhere, everywhere)]
    if isinstance(block, OnlineACBlock):
        row, column = (kh // 2, kw // 2) if block.placement == "skeleton" else (kh - 1, kw - 1)
        found.append(alone(block.ver_weight, everywhere, at(column)))
        found.append(alone(block.hor_weight, at(row), everywhere))
    if isinstance(block, OnlineRepVGG):
        found.append(alone(block.point_weight, *centre))
        if len(block.scale) == 3:
            itself = torch.eye(width, dtype=torch.float64).repeat(c_out // width, 1)[:, :, None, None]
            found.append(alone(itself, *centre))
    if isinstance(block, OnlineDiverseBranch):
        first = block.first_weight
        if block.internal == spec.c_in:
            first = first + torch.eye(width, dtype=torch.float64).repeat(len(first) // width, 1)[:, :, None, None]
        found.append(lambda x: F.conv2d(F.conv2d(x, first, groups=spec.groups), block.second_weight, **how))
        if spec.is_depthwise:
            found.append(lambda x: F.avg_pool2d(x, spec.kernel, spec.stride))
        else:
            point = block.mean_weight
            found.append(lambda x: F.avg_pool2d(F.conv2d(x, point, groups=spec.groups), spec.kernel, spec.stride))
            found.append(alone(block.point_weight, *centre))
    return found


def by_branches(block: Any, x: Tensor) -> Tensor:
    spec = block.spec
    x = spec.padded(x)
    top, bottom, left, right = spec.inner.pads
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode)
    maps = [branch(padded) for branch in branches(block)]
    assert len(maps) == len(block.scale)
    y = sum(scale[:, None, None] * one for scale, one in zip(block.scale, maps, strict=True))
    assert isinstance(y, Tensor)
    return y if block.bias is None else y + block.bias[:, None, None]


@every_case
def test_it_is_the_sum_of_its_branches_with_their_gradients(kind: str, name: str, options: dict[str, Any]) -> None:
    block = shaken(block_of(kind, conv_of(name), **options))
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), by_branches(block, x)
    assert y.shape == conv_of(name)(x).shape
    assert relative(y, expected) < EXACT
    noise, inputs = torch.randn_like(y), [x, *block.parameters()]
    found, right = (torch.autograd.grad(one, inputs, noise) for one in (y, expected))
    for one, other in zip(found, right, strict=True):
        assert relative(one, other) < EXACT


@every_case
def test_it_folds_to_the_conv_that_it_replaced(kind: str, name: str, options: dict[str, Any]) -> None:
    conv = conv_of(name)
    block = shaken(block_of(kind, conv, **options))
    folded, x = block.fold(), torch.randn(2, 6, 11, 10, dtype=torch.float64)
    assert type(folded) is type(conv)
    assert {key: one.shape for key, one in folded.state_dict().items()} == {
        key: one.shape for key, one in conv.state_dict().items()
    }
    assert relative(folded(x), by_branches(block, x)) < EXACT
    with torch.no_grad():
        folded.weight[-1, -1, 0, -1] += 1e-6
    assert relative(folded(x), by_branches(block, x)) > 1e3 * EXACT


@every_case
@pytest.mark.parametrize("init", ["takeover", "split"])
def test_it_starts_as_the_conv(kind: str, name: str, options: dict[str, Any], init: str) -> None:
    conv, x = conv_of(name), torch.randn(2, 6, 11, 10, dtype=torch.float64)
    block = block_of(kind, conv, init=init, **options)
    assert relative(block(x), conv(x)) < EXACT
    if init == "takeover":
        assert block.conv_weight is conv.weight
        narrow = copy.deepcopy(conv).float()
        assert torch.equal(block_of(kind, narrow, **options).kernel(), narrow.weight)  # bit for bit
    else:
        assert bool((block.scale != 0).all())
    assert block.bias is conv.bias


@every_kind
def test_split_gives_every_kernel_a_gradient_at_once_and_takeover_every_scale(kind: str) -> None:
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64)
    for init in ("split", "takeover"):
        block = block_of(kind, conv_of("plain"), init=init)
        (block(x) * torch.randn(2, 6, 11, 10, dtype=torch.float64)).sum().backward()
        still = {name for name, one in block.named_parameters() if not one.grad.any()}
        assert still == (set() if init == "split" else set(block.shapes()))
        assert bool((block.scale.grad != 0).all())


@every_kind
def test_scratch_starts_as_the_published_code_does(kind: str) -> None:
    block = block_of(kind, conv_of("plain"), init="scratch")
    starts = {"acblock": [0.25, 0.25, 0.25], "repvgg": [0.25, 1.0, 1.0], "dbb": [0.25, 0.5, 0.25, 1.0]}
    assert block.scale[:, 0].tolist() == starts[kind]
    bound = (6 / (6 * 9)) ** 0.5
    assert 0.9 * bound < float(block.conv_weight.detach().abs().max()) <= bound
    assert not block.bias.any()
    same = block_of(kind, conv_of("plain"), init="scratch", gamma=0.5)
    assert bool((same.scale == 0.5).all())


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)]
    return shake_(nn.Sequential(*layers), gently=True)


def recipe(kind: str, **options: object) -> dict[str, Any]:
    rule = {"swap": kind, "match": {"kernel": 3}, "with": {"form": "online", **options}}
    return {"surgeon": 1, "title": "T", "rules": [rule]}


def steps(model: nn.Module, count: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@every_kind
@pytest.mark.parametrize("init", ["takeover", "split"])
def test_a_network_starts_as_what_it_was_in_train_mode_too(kind: str, init: str) -> None:
    net = network().double()
    converted = surgeon.convert(net, recipe(kind, init=init), SHAPE)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert relative(converted.train()(x), net.train()(x)) < EXACT
    kept = converted.state_dict()
    for key, tensor in net.state_dict().items():  # the norms are where and what they were, after a step as well
        if key.split(".")[0] in ("1", "4"):
            assert relative(kept[key].double(), tensor.double()) < EXACT
    plan = surgeon.plan(net.eval(), recipe(kind, init=init), SHAPE)
    assert all(entry.note is None and not entry.takes_norm for entry in plan.swaps)


@every_kind
def test_trained_and_fused_it_has_the_keys_of_the_original_and_a_fault_is_found(kind: str) -> None:
    net = network()
    converted = steps(surgeon.convert(net, recipe(kind), SHAPE)).eval()
    for how in ({}, {"keep_norms": True}):
        fused = surgeon.fuse(converted, SHAPE, **how)
        assert list(fused.state_dict()) == list(net.state_dict())
        assert not any(isinstance(m, Block) for m in fused.modules())
        assert surgeon.verify(converted, fused, SHAPE).equivalent
        network().load_state_dict(fused.state_dict(), strict=True)
    with torch.no_grad():
        fused[3].weight[3, 1, 0, 2] += 1e-6
    assert not surgeon.verify(converted, fused, SHAPE).equivalent


def test_a_resnet_is_converted_trained_fused_and_proved_through_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4)
    keys = list(net.state_dict())
    converted = surgeon.convert(net, "acnet-online", SHAPE)
    assert sum(isinstance(m, OnlineACBlock) for m in converted.modules()) == 16
    surgeon.save(steps(converted, 1), tmp_path / "trained.pt")
    fused = tmp_path / "fused.pt"
    assert run_surgeon("fuse", tmp_path / "trained.pt", "-o", fused, "--input=1,3,32,32") == 0
    assert run_surgeon("verify", tmp_path / "trained.pt", fused, "--input=1,3,32,32") == 0
    made = surgeon.load(fused)
    assert list(made.state_dict()) == keys
    assert type(made.layer1[0].conv1) is nn.Conv2d


@every_kind
def test_a_plan_counts_one_convolution_and_the_sum(kind: str) -> None:
    plan = surgeon.plan(network().eval(), recipe(kind), (1, 3, 16, 16))
    last = plan.swaps[1]
    more = {"acblock": 8 * 8 * 6 + 3 * 8, "repvgg": 8 * 8 + 3 * 8, "dbb": 8 * 8 * (1 + 9 + 1 + 1) + 4 * 8}
    assert last.params.after - last.params.before == more[kind]
    product = 8 * 8 * 8 * 9 if kind == "dbb" else 0
    assert last.macs.after == last.macs.before + product


def test_weights_of_another_placement_are_refused() -> None:
    one, other = (surgeon.convert(network(), recipe("acblock", placement=where)) for where in ("skeleton", "border"))
    with pytest.raises(RuntimeError, match="these weights are for placement skeleton, and here it is placement border"):
        other.load_state_dict(one.state_dict())
    one.load_state_dict(surgeon.convert(network(), recipe("acblock")).state_dict())


def test_what_was_damaged_is_not_folded() -> None:
    converted = surgeon.convert(network(), recipe("acblock"), SHAPE)
    converted[0].ver_weight = nn.Parameter(torch.zeros(8, 3, 3, 2))
    with pytest.raises(PlanError, match=r"ver_weight has the shape \(8, 3, 3, 2\), and \(8, 3, 3, 1\) belongs there"):
        surgeon.fuse(converted)
    del converted[0].ver_weight
    with pytest.raises(PlanError, match="ver_weight is not there"):
        surgeon.fuse(converted)


@pytest.mark.parametrize("kind", [*KINDS, "hetconv"])
def test_a_plan_cannot_give_a_norm_to_a_block_that_takes_none(kind: str) -> None:
    given = recipe(kind) if kind in KINDS else {"surgeon": 1, "title": "T", "rules": [{"swap": kind, "with": {"p": 2}}]}
    plan = surgeon.plan(network().eval(), given, SHAPE).to_dict()
    entry = next(one for one in plan["convs"] if one["path"] == "3")
    entry["takes_norm"] = ["4"]
    with pytest.raises(PlanError, match=f"3: a block called {kind} with these options takes over no norm") as caught:
        surgeon.convert(network(), surgeon.Plan.model_validate(plan))
    assert "Take `takes_norm` out of these entries." in str(caught.value)


@every_kind
def test_it_is_compiled_whole_with_its_gradients(kind: str) -> None:
    block = shaken(block_of(kind, conv_of("plain"), init="split"))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    y, expected = compiled(x), block(x)
    assert relative(y, expected) < EXACT
    found, right = (torch.autograd.grad(one.square().sum(), list(block.parameters())) for one in (y, expected))
    assert all(relative(one, other) < EXACT for one, other in zip(found, right, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@every_kind
def test_it_is_exported_and_traced(kind: str) -> None:
    block = shaken(block_of(kind, conv_of("plain"))).eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    exported, traced = torch.export.export(block, (x,)).module(), torch.jit.trace(block, x)
    torch.jit.save(traced, io.BytesIO())
    for one in (exported, traced):
        assert relative(one(x), block(x)) < EXACT


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["acblock", "repvgg"])
def test_it_is_compiled_by_torchscript(kind: str) -> None:
    for name in ("plain", "no bias, stride 2", "same"):
        block, x = shaken(block_of(kind, conv_of(name))), torch.randn(2, 6, 9, 8, dtype=torch.float64)
        assert relative(torch.jit.script(block)(x), block(x)) < EXACT


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(("kind", "name"), [("dbb", "plain"), ("acblock", "reflect"), ("repvgg", "pads its input")])
def test_torchscript_is_refused_in_a_sentence(kind: str, name: str) -> None:
    with pytest.raises(CaptureError, match="unless it is fused first"):
        torch.jit.script(block_of(kind, conv_of(name)))


@every_kind
def test_under_autocast_the_kernel_is_cast_once_it_is_summed(kind: str) -> None:
    block = shaken(block_of(kind, conv_of("plain").float()))
    x = torch.randn(2, 6, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, kernel = block(x), block.kernel()
    assert y.dtype == torch.bfloat16
    assert torch.equal(kernel, block.kernel())
    expected = F.conv2d(x.bfloat16(), kernel.bfloat16(), block.bias.bfloat16(), padding=1)
    assert torch.equal(y, expected)


def test_a_recipe_names_the_block_and_not_its_form() -> None:
    assert {kind: registry()[kind] for kind in KINDS} == KINDS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_kind
def test_on_a_gpu_under_autocast_and_in_a_graph_it_computes_the_same(kind: str) -> None:
    block = shaken(block_of(kind, conv_of("plain").float())).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 8, device="cuda").to(memory_format=torch.channels_last)
    inputs = list(block.parameters())

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = block(x)
        return [y, *torch.autograd.grad(y.float().square().mean(), inputs)]

    wide = copy.deepcopy(block).double()
    expected = wide(x.double())
    right = [expected, *torch.autograd.grad(expected.square().mean(), list(wide.parameters()))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [one.clone() for one in step()]
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for one, other, exact in zip(eager, captured, right, strict=True):
        assert relative(one.double(), exact) < 3e-2
        assert relative(other.double(), exact) < 3e-2


def test_nobody_reads_one_summand_as_the_kernel() -> None:
    block = block_of("acblock", conv_of("plain"))
    assert isinstance(block, Online)
    assert not hasattr(block, "weight")
