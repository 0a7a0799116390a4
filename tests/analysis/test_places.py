"""What messages call the steps of a graph: the user's module, or the user's line."""

from __future__ import annotations

import inspect
import linecache
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import surgeon
from surgeon.analysis import places
from surgeon.analysis.islands import capture


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flip(2) * torch.softmax(  x ,
            dim=1).mul(2))  # fmt: skip
        return -y  # and a comment: é


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.gates = nn.ModuleList([Gate(), Gate()])
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for gate in self.gates:
            x = gate(x)
        return self.last(x)


def steps(net: nn.Module) -> dict[str, fx.Node]:
    return {node.name: node for node in capture(net).islands[0].graph.nodes}


LINE = inspect.getsourcelines(Gate.forward)[1]


@pytest.mark.parametrize(
    ("name", "kind", "one", "all_of_them"),
    [
        ("flip", None, f"`x.flip(2)` in Gate.forward (test_places.py:{LINE + 1}, gates.0)", None),
        ("flip_1", None, f"`x.flip(2)` in Gate.forward (test_places.py:{LINE + 1}, gates.1)", None),
        ("softmax", None, f"`torch.softmax( x , dim=1)` in Gate.forward (test_places.py:{LINE + 1}, gates.0)", None),
        ("neg", None, f"`-y` in Gate.forward (test_places.py:{LINE + 3}, gates.0)", None),
        ("gates_1_norm", nn.GroupNorm, "'gates.1.norm' (GroupNorm)", "a GroupNorm"),
        ("gates_1_norm", nn.InstanceNorm2d, "'gates.1.norm' (InstanceNorm2d)", "an InstanceNorm2d"),
        ("output", None, "the output", "the output"),
        ("x", None, "'x'", "'x'"),
    ],
)
def test_a_step_has_the_name_of_its_module_or_the_text_and_place_of_its_line(
    name: str, kind: type[nn.Module] | None, one: str, all_of_them: str | None
) -> None:
    node = steps(Net())[name]
    assert places.said(node, kind) == one
    shared = all_of_them or one.replace(", gates.0)", ")").replace(", gates.1)", ")")
    assert places.said_of_all(node, kind) == shared


def test_code_of_torchvision_is_not_torchs() -> None:
    node = steps(torchvision.models.resnet18())["add_1"]
    assert places.said(node).startswith("`out += identity` in BasicBlock.forward (resnet.py:")
    assert places.said(node).endswith(", layer1.1)")


def test_what_torch_itself_does_is_not_said_to_be_the_code_that_traces() -> None:
    class Plain(nn.Sequential): ...

    for node in steps(Plain(nn.Conv2d(3, 8, 1), nn.ReLU())).values():
        assert places.PLACE not in node.meta


def test_without_source_a_step_keeps_its_name_and_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    node = steps(Net())["flip"]
    monkeypatch.setattr(linecache, "getline", lambda *_: "")
    assert places.said(node) == f"'flip' in Gate.forward (test_places.py:{LINE + 1}, gates.0)"
    monkeypatch.setattr(linecache, "getline", lambda *_: "    something = that(was, edited, since, then) +")
    assert "`" not in places.said(node)


def test_a_graph_from_a_file_has_only_the_names_of_its_steps(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    converted = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]}, (1, 16, 32, 32))
    surgeon.save(converted, str(tmp_path / "net.pt"))
    again = surgeon.load(str(tmp_path / "net.pt"))
    named = [places.said(node) for node in capture(again).islands[0].graph.nodes if node.op == "call_function"]
    assert named
    assert all(name.startswith("'getitem") for name in named)


def test_plans_tell_which_line_of_whose_forward_ends_two_streams() -> None:
    plan = surgeon.plan(Net(), {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]}, (1, 3, 32, 32))
    [why] = {entry.skip for entry in plan.convs if entry.path == "conv"}
    ends = f"`x.flip(2)` in Gate.forward (test_places.py:{LINE + 1}), which needs the whole map"
    assert why == f"it reads no low channels, and two streams would end right behind it, in {ends}"
