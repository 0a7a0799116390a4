"""Weights know the role that they were trained in: a state dict does not load silently where it means something else.

An octave network has the keys and shapes of the network that it came from, whichever channels are low, and HetConvs and
ACBlocks have the same shapes in every layout.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative, run_surgeon, shake_
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import surgeon

SHAPE = (2, 8, 16, 16)


def conv(c_in: int = 8, c_out: int = 8, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1)


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(stride=2), nn.BatchNorm2d(8), nn.ReLU(), conv()]
    return shake_(nn.Sequential(*layers), gently=True).eval()


def made(block: str, seed: int = 0, **options: object) -> nn.Module:
    rule = {"swap": block, "with": {"min_size": 1, **options} if block == "octave" else options}
    return surgeon.convert(plain(seed), {"surgeon": 1, "title": "T", "rules": [rule]}, SHAPE)


KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], str]] = {
    "octave, other low channels": (
        lambda seed=0: made("octave", seed, alpha=0.5),
        lambda seed=0: made("octave", seed, alpha=0.25),
        "0: these weights are for low_out 6:8, and here it is low_out 4:8; convert",
    ),
    "octave, other strides": (
        lambda seed=0: made("octave", seed),
        lambda seed=0: made("octave", seed, downsample="pool-both"),
        "3: these weights are for downsample pool-both, and here it is downsample paper",
    ),
    "octave, fused": (
        lambda seed=0: surgeon.fuse(made("octave", seed)),
        lambda seed=0: surgeon.fuse(made("octave", seed, downsample="pool-both")),
        "3: these weights are for downsample pool-both, and here it is downsample paper",
    ),
    "hetconv, another layout": (
        lambda seed=0: made("hetconv", seed, p=2, layout="block"),
        lambda seed=0: made("hetconv", seed, p=2, layout="interleaved"),
        "0: these weights are for layout interleaved, and here it is layout block",
    ),
    "acblock, another placement": (
        lambda seed=0: made("acblock", seed),
        lambda seed=0: made("acblock", seed, placement="border"),
        "0: these weights are for placement border, and here it is placement skeleton",
    ),
}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_wrapper(state: Any) -> Any:
    """As DataParallel writes it, and as it is read again."""
    network = nn.Module()
    held = nn.Module()
    network.add_module("module", held)
    wrapped = copy.copy(state)
    wrapped.clear()
    wrapped.update((f"module.{key}", value) for key, value in state.items())
    wrapped._metadata = {f"module.{path}": one for path, one in state._metadata.items()}
    consume_prefix_in_state_dict_if_present(wrapped, "module.")
    return wrapped


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda state: state,
    "a copy": copy.deepcopy,
    "a file": through_a_file,
    "a wrapper": through_a_wrapper,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_another_role_are_refused(kind: str, way: str) -> None:
    here, there, message = KINDS[kind]
    own, others = here(), there(1)
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(RuntimeError, match="Error") as said:
            here().load_state_dict(WAYS[way](others.state_dict()), **options)
        assert message in str(said.value)
        assert "convert the network with the plan that theirs was converted with" in str(said.value)
    again, x = here(1), torch.randn(SHAPE)
    again.load_state_dict(WAYS[way](own.state_dict()))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), own.eval()(x))


@pytest.mark.parametrize("way", WAYS)
def test_plain_weights_load_into_an_octave_network_and_the_reverse(way: str) -> None:
    x = torch.randn(SHAPE)
    octave, net = made("octave", 1), plain()
    octave.load_state_dict(WAYS[way](net.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(octave(x), made("octave", 0)(x))
        net = plain(2)
        net.load_state_dict(WAYS[way](octave.state_dict()), strict=True)
        assert torch.equal(net(x), plain(0)(x))


def test_published_weights_of_blocks_load() -> None:
    """They are plain dicts, which say nothing of roles."""
    block = made("acblock")
    block.load_state_dict(dict(made("acblock", 1, placement="border").state_dict()))


def test_the_command_refuses_them_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint, and a file with another plan that is named as its network."""
    surgeon.save(made("octave", alpha=0.25), tmp_path / "net.pt")
    torch.save(made("octave", 1).state_dict(), tmp_path / "weights.pt")
    code = run_surgeon("fuse", tmp_path / "weights.pt", "--arch", tmp_path / "net.pt", "-o", tmp_path / "fused.pt")
    assert code == 2
    assert "6: these weights are for low_in 4:8, and here it is low_in 6:8" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "fused.pt").exists()
    torch.save(made("octave", 1, alpha=0.25).state_dict(), tmp_path / "weights.pt")
    code = run_surgeon("fuse", tmp_path / "weights.pt", "--arch", tmp_path / "net.pt", "-o", tmp_path / "fused.pt")
    assert code == 0


def test_roles_do_not_excuse_a_network_from_being_verified() -> None:
    """B holds the right tensors in blocks of other roles."""
    net = plain()
    right, wrong = surgeon.convert(net, _recipe(0.5), SHAPE), surgeon.convert(net, _recipe(0.25), SHAPE)
    fused = surgeon.fuse(right)
    other = surgeon.fuse(wrong)
    other.surgeon_provenance = fused.surgeon_provenance
    assert not surgeon.verify(right, other, SHAPE).equivalent
    with torch.no_grad():
        assert relative(other(torch.randn(SHAPE)), fused(torch.randn(SHAPE))) > 1e-3


def _recipe(alpha: float) -> dict[str, Any]:
    return {"surgeon": 1, "title": "T", "rules": [{"swap": "octave", "with": {"min_size": 1, "alpha": alpha}}]}


def test_what_a_state_dict_says_of_roles_is_plain_data_whose_names_stay() -> None:
    held = made("octave").state_dict()._metadata
    assert held["0"]["surgeon.role"] == {"low_in": "none", "low_out": "4:8"}
    assert held["3"]["surgeon.role"] == {"low_in": "4:8", "low_out": "4:8", "downsample": "paper"}
    assert made("hetconv", p=2).state_dict()._metadata["0"]["surgeon.role"] == {"p": 2, "layout": "block"}
    assert made("acblock").state_dict()._metadata["0"]["surgeon.role"] == {"placement": "skeleton"}


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    state = made("acblock").state_dict()
    state._metadata["0"]["surgeon.role"]["later"] = 1
    made("acblock", 1).load_state_dict(state)
