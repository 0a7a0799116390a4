"""What lies in the same memory does so after convert and fuse, in every copy, and in a file that is opened again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon
from surgeon.models.copies import duplicate, shadow, to_meta

SHAPE = (2, 3, 16, 16)
OCTAVE = {"surgeon": 1, "title": "T", "rules": [{"swap": "octave", "with": {"min_size": 1}}]}


class Shares(nn.Module):
    """Every way in which two tensors of a network can be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.other_norm.running_mean = self.norm.running_mean
        self.register_buffer("shift", torch.randn(8))
        self.below = nn.Module()
        self.below.register_buffer("shift_again", self.shift)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("scale_as_it_is", self.scale.data)
        self.register_buffer("table", torch.randn(4, 8))
        self.register_buffer("row", self.table[2])
        self.register_buffer("column", self.table[:, 1])
        self.plain, self.known = self.table, {"shift": self.shift}
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = self.other_norm(self.b(x)).relu() + self.shift[:, None, None]
        return self.second(self.first(x.mean((2, 3)) * self.scale)) + self.row


GROUPS = [
    {"shift", "below.shift_again", "known"},
    {"scale", "scale_as_it_is"},
    {"table", "row", "column", "plain"},
    {"first.weight", "second.weight"},
    {"norm.running_mean", "other_norm.running_mean"},
]


def network() -> Shares:
    torch.manual_seed(0)
    return shake_(Shares(), gently=True).eval()


def tensors(net: nn.Module) -> dict[str, Tensor]:
    own = {"plain": net.plain, "known": net.known["shift"]}
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
        **own,
    }


def shared(net: nn.Module) -> list[set[str]]:
    """Find out by writing: what else changes when a number is written into each tensor."""
    held, found = tensors(net), []
    with torch.no_grad():
        for name in held:
            before = {key: value.clone() for key, value in held.items()}
            held[name].view(-1)[:].add_(1) if held[name].is_contiguous() else held[name].add_(1)
            moved = {key for key, value in held.items() if not torch.equal(value, before[key])}
            if len(moved) > 1 and not any(moved <= one for one in found):
                found = [one for one in found if not one < moved] + [moved]
    return found


def opened(net: nn.Module, folder: Path) -> nn.Module:
    surgeon.save(net, folder / "net.pt")
    return surgeon.load(folder / "net.pt", allow=["test_aliases"])


MADE: dict[str, Callable[[Shares], nn.Module]] = {
    "as it is": lambda net: net,
    "a copy": duplicate,
    "a copy in float64": lambda net: shadow(net, lambda t: t.double()),
    "acnet": lambda net: surgeon.convert(net, "acnet", SHAPE),
    "acnet, fused": lambda net: surgeon.fuse(surgeon.convert(net, "acnet", SHAPE)),
    "octave": lambda net: surgeon.convert(net, OCTAVE, SHAPE),
    "octave, fused": lambda net: surgeon.fuse(surgeon.convert(net, OCTAVE, SHAPE)),
}


@pytest.mark.parametrize("how", MADE)
def test_what_shares_memory_shares_it_in_what_is_made_of_it(how: str, tmp_path: Path) -> None:
    net = MADE[how](network())
    again = opened(net, tmp_path)
    expected = [group & tensors(net).keys() for group in GROUPS]
    expected = [group for group in expected if len(group) > 1]
    for one in (net, again):
        found = shared(one)
        assert [group for group in expected if group not in found] == []
        assert len(found) == len(expected)


def test_a_shadow_shares_its_buffers_with_each_other_and_not_with_the_original() -> None:
    net = network()
    made = shadow(net)
    found = shared(made)
    assert {"table", "row", "column", "plain"} in found
    assert {"shift", "below.shift_again", "known"} in found
    assert {"norm.running_mean", "other_norm.running_mean"} in found
    with torch.no_grad():
        before = {key: value.clone() for key, value in net.named_buffers()}
        for buffer in made.buffers():
            buffer.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in net.named_buffers())
    assert all(value.is_meta for value in tensors(shadow(net, to_meta)).values())


def test_a_safetensors_file_holds_a_tensor_once_and_its_network_shares_it_again(tmp_path: Path) -> None:
    arch = f"{Path(__file__)}:network"
    surgeon.save(surgeon.convert(network(), "acnet", SHAPE), tmp_path / "net.safetensors", arch=arch)
    again = surgeon.load(tmp_path / "net.safetensors", arch=arch)
    found = shared(again)
    assert [group for group in GROUPS if group not in found] == []


def test_a_norm_whose_statistics_another_one_shares_is_not_taken_over() -> None:
    plan = surgeon.plan(network(), "acnet", SHAPE)
    assert ["norm shares its statistics" in str(entry.note) for entry in plan.convs if entry.path == "a"] == [True]
