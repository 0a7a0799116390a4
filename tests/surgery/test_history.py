"""What surgeon writes: read back safely, whole or not at all, with its history."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from helpers import shake_
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgeon
from surgeon.app.demo.net import SmallResNet
from surgeon.errors import ModelError, StoreError, SurgeonError
from surgeon.surgery import history as histories

INPUT = (1, 1, 28, 28)
ARCH = "surgeon.app.demo.net:SmallResNet"


@pytest.fixture
def converted() -> nn.Module:
    torch.manual_seed(0)
    return surgeon.convert(shake_(SmallResNet(), 1), "acnet", INPUT)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize("fold", [False, True], ids=["converted", "fused"])
def test_a_model_comes_back_as_it_was(
    converted: nn.Module, fold: bool, suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = surgeon.convert(shake_(SmallResNet(), 1).to(dtype), "acnet", INPUT)
    model = surgeon.fuse(model) if fold else model
    path = tmp_path / f"net.{suffix}"
    surgeon.save(model, path, arch=ARCH)
    arch = ARCH if suffix == "safetensors" else None  # a file may not name code of one's own
    again = surgeon.load(path, arch=arch)
    assert type(again) is SmallResNet
    assert _equal(again, model)
    assert histories.history(again) == histories.history(model)
    x = torch.randn(2, 1, 28, 28, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_library_network_needs_no_architecture_to_come_back(tmp_path: Path) -> None:
    model = surgeon.convert(surgeon.load("torchvision:resnet18"), "acnet", (1, 3, 32, 32))
    surgeon.save(model, tmp_path / "net.safetensors", arch="torchvision:resnet18")
    assert _equal(surgeon.load(tmp_path / "net.safetensors"), model)


def test_plain_torch_opens_a_pt_and_any_reader_a_safetensors(converted: nn.Module, tmp_path: Path) -> None:
    surgeon.save(converted, tmp_path / "net.pt")
    surgeon.save(converted, tmp_path / "net.safetensors")
    assert _equal(torch.load(tmp_path / "net.pt", weights_only=False), converted)
    tensors = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in converted.state_dict().items())


def test_a_fused_file_needs_no_surgeon(converted: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    surgeon.save(surgeon.fuse(converted), path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert not [
        name for name in names if name.startswith("surgeon") and not name.endswith(("SmallResNet", "BasicBlock"))
    ]


def test_the_file_tells_where_the_model_comes_from(converted: nn.Module, tmp_path: Path) -> None:
    surgeon.save(surgeon.fuse(converted), tmp_path / "net.safetensors", arch=ARCH)
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["surgeon"])
    convert, fuse = manifest["history"]
    assert [convert["operation"], fuse["operation"]] == ["convert", "fuse"]
    assert "init: takeover" in convert["plan"]["recipe"]["text"]
    assert convert["result"] == fuse["parent"] == histories.content_hash(converted)
    assert convert["versions"].keys() == {"surgeon", "torch", "python"}


def test_history_survives_training_and_ones_own_torch_save(converted: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        next(converted.parameters()).add_(0.1)
    torch.save(converted, tmp_path / "trained.pt")
    again = surgeon.load(tmp_path / "trained.pt")
    assert [step.operation for step in histories.history(again)] == ["convert"]
    assert surgeon.verify(again, surgeon.fuse(again), INPUT).checks[0].name == "mathematics"


def test_weights_of_a_trained_model_go_into_the_converted_file(converted: nn.Module, tmp_path: Path) -> None:
    surgeon.save(converted, tmp_path / "net.acnet.pt")
    with torch.no_grad():
        next(converted.parameters()).add_(0.1)
    torch.save(converted.state_dict(), tmp_path / "trained.pt")
    again = surgeon.load(tmp_path / "trained.pt", arch=str(tmp_path / "net.acnet.pt"))
    assert _equal(again, converted)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = self.alias = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alias(self.conv(x))

    model = Twice()
    surgeon.save(model, tmp_path / "net.safetensors")
    assert sorted(load_file(tmp_path / "net.safetensors")) == ["conv.bias", "conv.weight"]


def test_nothing_is_overwritten_unless_asked(converted: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"precious")
    with pytest.raises(StoreError, match="--force"):
        surgeon.save(converted, path)
    assert path.read_bytes() == b"precious"
    surgeon.save(converted, path, force=True)
    assert _equal(surgeon.load(path), converted)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    converted: nn.Module, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(b"precious")

    def full(model: object, part: Path | BinaryIO, **rest: object) -> None:
        with part.open("wb") if isinstance(part, Path) else contextlib.nullcontext(part) as file:
            file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("surgeon.files.formats.safetensors.save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoreError, match="No space left on device"):
        surgeon.save(converted, path, force=True)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "says"), [("net.txt", "End it in"), ("net", "End it in"), ("no/net.pt", "no folder"), (".", "directory")]
)
def test_names_that_cannot_be_written(converted: nn.Module, name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=says):
        surgeon.save(converted, tmp_path / name)
    assert not list(tmp_path.iterdir())


def _with_manifest(path: Path, model: nn.Module, manifest: object) -> Path:
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path, metadata={"surgeon": json.dumps(manifest)})
    return path


@pytest.mark.parametrize("manifest", [{}, [], {"architecture": 3}, {"architecture": None, "history": [{}]}])
def test_a_manifest_that_is_not_ours_is_refused(converted: nn.Module, manifest: object, tmp_path: Path) -> None:
    path = _with_manifest(tmp_path / "net.safetensors", converted, manifest)
    with pytest.raises(StoreError, match="--arch"):
        surgeon.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": 5},
        {"plan": "zz"},
        {"plan": {"surgeon-plan": 1}},
        {"operation": 3},
        {"parent": None},
        {"operation": 3, "more": 1},
    ],
    ids=str,
)
def test_a_history_that_is_not_ours_is_refused(converted: nn.Module, change: dict[str, object], tmp_path: Path) -> None:
    (step,) = converted.surgeon_provenance["history"]
    converted.surgeon_provenance = {"format": 1, "history": [{**step, **change}]}
    surgeon.save(converted, tmp_path / "net.pt")
    with pytest.raises(StoreError, match="is not a history that surgeon"):
        surgeon.verify(converted, surgeon.load(tmp_path / "net.pt"), INPUT)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("path",), "no.such.conv"),
        (("takes_norm",), ["fc"]),
        (("with", "init"), "sideways"),
        (("swap",), "hetconv"),
    ],
    ids=str,
)
def test_a_plan_in_a_file_is_checked_before_it_is_carried_out(
    converted: nn.Module, where: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    entry = next(one for one in converted.surgeon_provenance["history"][0]["plan"]["convs"] if "swap" in one)
    for key in where[:-1]:
        entry = entry.setdefault(key, {})
    entry[where[-1]] = value
    surgeon.save(converted, tmp_path / "net.safetensors", arch=ARCH)
    with pytest.raises(SurgeonError) as caught:
        surgeon.load(tmp_path / "net.safetensors", arch=ARCH)
    assert caught.value.exit_code == 2


def _later_format(data: dict[str, Any]) -> None:
    data["format"] = histories.FORMAT + 1


def _more_fields(data: dict[str, Any]) -> None:
    data["history"][0]["mood"] = "good"


@pytest.mark.parametrize("change", [_later_format, _more_fields])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_a_later_version_has_written_is_refused(
    converted: nn.Module, change: Callable[[dict[str, Any]], None], suffix: str, tmp_path: Path
) -> None:
    change(converted.surgeon_provenance)
    path = tmp_path / f"net.{suffix}"
    surgeon.save(converted, path, arch=ARCH)
    with pytest.raises(StoreError, match="written by a later version of surgeon than"):
        histories.history(surgeon.load(path, arch=None if suffix == "pt" else ARCH))


@pytest.mark.parametrize("number", [0, -1, True, "2", None, [2]], ids=str)
def test_a_format_that_is_no_number_is_refused(converted: nn.Module, number: object) -> None:
    converted.surgeon_provenance["format"] = number
    with pytest.raises(StoreError, match="is not a history that surgeon"):
        histories.history(converted)


def test_a_step_of_an_older_version_lacks_fields(converted: nn.Module) -> None:
    full = histories.history(converted)
    for field in ("versions", "dense"):
        del converted.surgeon_provenance["history"][0][field]
    converted.surgeon_provenance["format"] = 1
    (step,) = histories.history(converted)
    assert (step.versions, step.dense) == ({}, False)
    assert (step.operation, step.plan, step.result) == (full[0].operation, full[0].plan, full[0].result)
    assert surgeon.verify(shake_(_original(), 1), converted, INPUT).verdict == "equivalent"


def _original() -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet()


def test_a_manifest_cannot_name_code(converted: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef net(**_): ...\n")
    for name, args in {
        "os:system": {"command": f"touch {marker}"},
        "evil:net": {},
        "evil.py:net": {},
        ":x": {},
    }.items():
        manifest = {"format": 1, "architecture": {"name": name, "args": args}, "history": []}
        path = _with_manifest(tmp_path / "net.safetensors", converted, manifest)
        with pytest.raises(ModelError):
            surgeon.load(path)
        path.unlink()
    assert not marker.exists()


def test_a_file_is_not_put_on_a_network_that_it_was_not_made_from(converted: nn.Module, tmp_path: Path) -> None:
    surgeon.save(converted, tmp_path / "net.safetensors")
    with pytest.raises(StoreError, match="not made from that network"):
        surgeon.load(tmp_path / "net.safetensors", arch="torchvision:resnet18")


def test_the_hash_sees_every_number_dtype_and_name(converted: nn.Module) -> None:
    known = histories.content_hash(converted)
    assert histories.content_hash(copy.deepcopy(converted)) == known
    changed = copy.deepcopy(converted)
    with torch.no_grad():
        changed.fc.bias[3] = torch.nextafter(changed.fc.bias[3], torch.tensor(9.0))
    assert histories.content_hash(changed) != known
    assert histories.content_hash(copy.deepcopy(converted).double()) != known


def test_what_was_measured_stands_in_the_history(converted: nn.Module) -> None:
    [made] = surgeon.history(converted)
    blocks = sum(isinstance(module, surgeon.ACBlock) for module in converted.modules())
    assert made.measured["sites"] == blocks
    assert made.measured["worst"] <= 1e-10
    assert made.measured["whole"] < 1e-5
    fused = surgeon.fuse(converted)
    assert surgeon.history(fused)[1].measured["folded"] == blocks
    assert 0 < surgeon.history(fused)[1].measured["whole"] < 1e-5


def test_what_was_measured_does_not_tell_histories_apart(converted: nn.Module) -> None:
    """Another machine measures something else of the same operation."""
    [made] = surgeon.history(converted)
    assert dataclasses.replace(made, measured={"whole": 1.0}) == made


@pytest.mark.parametrize("change", [{"operation": "zap"}, {"plan": None}], ids=["another operation", "no plan"])
def test_an_operation_that_cannot_be_one_is_refused(converted: nn.Module, change: dict[str, object]) -> None:
    converted.surgeon_provenance["history"][0] |= change
    with pytest.raises(StoreError, match="is not a history that surgeon"):
        surgeon.history(converted)


@pytest.mark.parametrize("foreign", [5, None, "text", [1]])
def test_what_is_no_history_is_not_written(converted: nn.Module, foreign: object, tmp_path: Path) -> None:
    converted.surgeon_provenance = foreign
    with pytest.raises(StoreError, match="attribute surgeon_provenance of the model is not a history"):
        surgeon.save(converted, tmp_path / "net.safetensors", arch=ARCH)
    assert not list(tmp_path.iterdir())


def test_models_that_went_different_ways_are_compared_as_they_are() -> None:
    """Octave networks keep the tensors of their origin, so hashes alone would take one for the origin of the other."""
    net = shake_(SmallResNet(), 1)
    half, quarter = (
        surgeon.convert(net, "octave", INPUT, overrides=[f"rules[1].with.alpha={alpha}", "rules[1].with.min_size=2"])
        for alpha in (0.5, 0.25)
    )
    report = surgeon.verify(half, quarter, INPUT)
    assert report.verdict == "different"
    assert surgeon.verify(net, half, INPUT).verdict == "approximate"
    assert surgeon.verify(half, surgeon.fuse(half), INPUT).verdict == "equivalent"
