"""A GraphModule is a model as any other, whoever made it: torch.fx, an importer of ONNX, or a user by hand."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import shake_
from torch import Tensor, fx, nn

import surgeon

SHAPE = (2, 3, 16, 16)
OVERRIDES = {"octave": ["rules[1].with.min_size=2"]}


def scaled(x: Tensor, by: int) -> Tensor:
    return x * by if by > 1 else x


def untraceable(x: Tensor) -> Tensor:
    return x if float(x.detach().sum()) > -1e30 else -x


def layers() -> nn.Module:
    kinds = [layer for c in (3, 16, 16) for layer in (nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(*kinds)


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(layers())


def imported() -> fx.GraphModule:
    """Modules under names that no attribute could have, functions of the user's, methods, parameters as they are."""
    root, graph = nn.Module(), fx.Graph()
    held = {
        "/stem/Conv": nn.Conv2d(3, 16, 3, padding=1, bias=False),
        "onnx::BN_1": nn.BatchNorm2d(16),
        "/body/Conv": nn.Conv2d(16, 16, 3, padding=1),
        "Block_0": nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        "/last/Conv": nn.Conv2d(16, 16, 3, padding=1),
    }
    for name, module in held.items():
        root.add_module(name, module)
    root.register_parameter("kernel", nn.Parameter(torch.randn(16, 16, 3, 3) * 0.1))
    root.register_parameter("gain", nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5))
    x = graph.placeholder("input")
    x = graph.call_module("/stem/Conv", (x,))
    x = graph.call_method("relu", (graph.call_module("onnx::BN_1", (x,)),))
    x = graph.call_module("Block_0", (graph.call_module("/body/Conv", (x,)),))
    y = graph.call_function(torch.conv2d, (x, graph.get_attr("kernel")), {"padding": 1})
    x = graph.call_function(scaled, (graph.call_function(torch.add, (x, y)), 2))
    x = graph.call_function(operator.mul, (graph.call_module("/last/Conv", (x,)), graph.get_attr("gain")))
    graph.output(graph.call_function(untraceable, (x,)))
    return fx.GraphModule(root, graph)


def inside() -> nn.Module:
    return nn.Sequential(imported(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "traced": (traced, 3),
    "imported": (imported, 5),
    "inside another": (inside, 7),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return shake_(NETS[request.param][0]()).eval()


@pytest.mark.parametrize("name", NETS)
def test_every_conv_is_found(name: str) -> None:
    make, count = NETS[name]
    survey = surgeon.survey(make(), SHAPE)
    assert len(survey.sites) == count
    # what becomes of F.conv2d in a network of another class has to be stored, and a function of the user's cannot be
    said = "scaled(add, 2)` in forward (GraphModule.code:14, 0) calls scaled, which is not on surgeon's list"
    found = [site.obstacle for site in survey.sites if site.obstacle]
    assert [obstacle.partition("modules_")[2] for obstacle in found] == [said] * (name == "inside another")
    assert [island.path for island in survey.network.islands] == [""]


@pytest.mark.parametrize("recipe", ["acnet", "hetconv-p4", "octave"])
def test_every_block_takes_its_convs(net: nn.Module, recipe: str) -> None:
    x, before = torch.randn(SHAPE), copy.deepcopy(net)
    converted = surgeon.convert(net, recipe, SHAPE, overrides=OVERRIDES.get(recipe, ()))
    fused = surgeon.fuse(converted)
    assert surgeon.verify(converted, fused, SHAPE).equivalent
    assert surgeon.verify(net, converted, SHAPE).verdict == ("equivalent" if recipe == "acnet" else "approximate")
    with torch.no_grad():
        assert torch.equal(net(x), before(x))
        assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    converted.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


def test_streams_are_led_through_and_it_stays_a_graph_module() -> None:
    torch.manual_seed(0)
    network = shake_(layers()).eval()
    net = fx.symbolic_trace(network)
    plan = surgeon.plan(net, "octave", SHAPE, overrides=OVERRIDES["octave"])
    assert plan.rewritten == ("",)
    assert not plan.seams
    converted, x = surgeon.convert(net, plan), torch.randn(SHAPE)
    assert isinstance(converted, fx.GraphModule)
    assert converted.code != net.code
    of_network = surgeon.convert(network, "octave", SHAPE, overrides=OVERRIDES["octave"])
    with torch.no_grad():
        assert torch.equal(converted(x), of_network(x))
        converted.recompile()
        assert torch.equal(copy.deepcopy(converted)(x), of_network(x))
    converted.graph.lint()


def test_what_is_not_on_our_lists_is_no_seam_of_a_graph_module_with_streams() -> None:
    torch.manual_seed(0)
    plan = surgeon.plan(imported().eval(), "octave", SHAPE, overrides=OVERRIDES["octave"])
    assert plan.rewritten == ("",)
    assert {seam.kind for seam in plan.seams} <= {"join", "split"}


def test_its_history_goes_with_every_copy() -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).eval()
    converted = surgeon.convert(net, "acnet", (1, 3, 8, 8))
    fused = surgeon.fuse(converted, (1, 3, 8, 8), keep_norms=True)
    assert [step.operation for step in surgeon.history(fused)] == ["convert", "fuse"]
    assert {*fused.state_dict()} == {*net.state_dict()}
    assert surgeon.verify(converted, fused).verdict == "equivalent"


def test_undoing_gives_the_graph_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = shake_(traced()).eval(), torch.randn(SHAPE)
    code, before = net.code, net(x)
    converted = surgeon.convert(net, "octave", SHAPE, overrides=OVERRIDES["octave"])
    monkeypatch.setattr("surgeon.surgery.fuse.is_far", lambda *_: True)
    streams, expected = converted.code, converted(x)
    with pytest.raises(surgeon.errors.PassError):
        surgeon.fuse_(converted, SHAPE)
    assert converted.code == streams
    assert torch.equal(converted(x), expected)
    assert net.code == code
    assert torch.equal(net(x), before)


def test_exported_graphs_keep_their_refusal() -> None:
    exported = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (torch.randn(SHAPE),)).module()
    with pytest.raises(surgeon.errors.ModelError, match=r"exported graph.*Give the network that was exported"):
        surgeon.convert(exported, "acnet", SHAPE)


def test_a_file_of_one_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    converted = surgeon.convert(traced().eval(), "octave", SHAPE, overrides=OVERRIDES["octave"])
    with pytest.raises(surgeon.errors.StoreError, match=r"GraphModule, whose file would be a program.*\.safetensors"):
        surgeon.save(converted, "net.pt")
    assert not Path("net.pt").exists()
    surgeon.save(converted, "net.safetensors")
    again = surgeon.load("net.safetensors", arch=f"{__name__}:traced").eval()
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.equal(again(x), converted(x))
