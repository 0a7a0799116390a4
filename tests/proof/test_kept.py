"""Recordings that lie in a file: the same numbers in the same order, and the same reports."""

from __future__ import annotations

import tempfile
from typing import IO

import pytest
import torch
import torchvision
from helpers import narrow, shake_
from torch import Tensor, nn

import surgeon
from surgeon.proof import kept

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """Let everything that is recorded lie in files, and list them."""
    made: list[IO[bytes]] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    monkeypatch.setattr(kept, "_SMALL", 0)
    monkeypatch.setattr(kept.tempfile, "TemporaryFile", lambda **how: made.append(real(**how)) or made[-1])
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_as_it_was(files: list[IO[bytes]], dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    kinds = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.mT,
        x[:, :1].expand(2, 3, 5, 7),
        x[0, 0, 0, 0],
        x[:0],
    ]
    copies = kept.Copies()
    held = copies.of({"all": kinds, "name": "x", "none": None})
    assert files
    back = kept.read(held)
    assert (back["name"], back["none"]) == ("x", None)
    for one, other in zip(kinds, back["all"], strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)
    assert back["all"][1].is_contiguous(memory_format=torch.channels_last)


def test_what_nothing_has_changed_lies_there_once(files: list[IO[bytes]]) -> None:
    copies, x = kept.Copies(), torch.ones(1000)
    first, again = copies.of(x), copies.of(x)
    assert first is again
    x.data.add_(1)  # without a new version
    changed = copies.of(x)
    assert kept.read(first).sum() == 1000
    assert kept.read(changed).sum() == 2000


def test_no_room_for_a_file_keeps_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    monkeypatch.setattr(kept, "_SMALL", 0)
    monkeypatch.setattr(kept.tempfile, "TemporaryFile", full)
    copy = kept.Copies().of(torch.ones(1000))
    assert isinstance(copy, Tensor)


def net() -> nn.Module:
    torch.manual_seed(0)
    return shake_(narrow(torchvision.models.resnet18(num_classes=8)), gently=True).eval()


@pytest.mark.parametrize("recipe", ["acnet", "octave"])
def test_a_report_is_the_same_where_recordings_lie_in_files(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = surgeon.convert(net(), recipe, (1, 3, 64, 64))
    fused = surgeon.fuse(converted)
    foreign = net()
    foreign.get_submodule("layer2.0.conv1").weight.data[0, 0, 1, 1] += 1e-3  # type: ignore[union-attr, operator]
    pairs = [(converted, fused), (net(), foreign)]
    held = [surgeon.verify(*pair, (2, 3, 64, 64)) for pair in pairs]
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    monkeypatch.setattr(kept, "_SMALL", 0)
    filed = [surgeon.verify(*pair, (2, 3, 64, 64)) for pair in pairs]
    assert [one.to_dict() for one in filed] == [one.to_dict() for one in held]
    assert [one.verdict for one in filed] == ["equivalent", "different"]
    assert filed[1].first_to_diverge == "layer2.0.conv1"
    real = kept.InFile.read
    monkeypatch.setattr(
        kept.InFile, "read", lambda one: real(one) * 1.001 if one._dtype.is_floating_point else real(one)
    )
    assert surgeon.verify(net(), net(), (2, 3, 64, 64)).verdict == "different"  # that it reads what lies there
