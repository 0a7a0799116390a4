"""To add a file format is to add a file; a file is told by its first bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import surgeon
from surgeon.errors import ModelError, StoreError
from surgeon.files import formats
from surgeon.files.load import read_tensors
from surgeon.surgery.history import history

NUMPY = """
import numpy, torch
from surgeon.files.formats.base import Format

class Npz(Format):
    name = "NumPy archives"
    suffixes = (".npz",)

    def knows(self, path, head):
        return head.startswith(b"NUMPY")

    def read(self, path, trust):
        with path.open("rb") as file:
            file.seek(5)
            return {key: torch.from_numpy(array) for key, array in numpy.load(file).items()}

    def write(self, model, path, manifest):
        arrays = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        with path.open("wb") as file:
            file.write(b"NUMPY")
            numpy.savez(file, **arrays)
"""


@pytest.fixture
def with_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put one more file beside the formats that there are."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "npz.py").write_text(NUMPY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(folder)])
    formats.known.cache_clear()
    yield
    formats.known.cache_clear()


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_the_formats_that_there_are() -> None:
    assert [type(one).__name__ for one in formats.known()] == ["Safetensors", "Pt"]
    assert set(formats.suffixes()) == {".pt", ".pth", ".safetensors"}


@pytest.mark.usefixtures("with_numpy")
def test_a_file_in_the_folder_is_a_format(tmp_path: Path) -> None:
    net = _net()
    with pytest.raises(ImportError):
        import npz  # noqa: F401 - it is found in the folder, not on the path
    surgeon.save(net, tmp_path / "net.npz")
    tensors, _ = read_tensors(tmp_path / "net.npz")
    assert all(torch.equal(tensors[key], value) for key, value in net.state_dict().items())
    (tmp_path / "net.npz").rename(tmp_path / "net.bin")  # told by its first bytes, not by its name
    assert read_tensors(tmp_path / "net.bin")[0].keys() == net.state_dict().keys()
    with pytest.raises(ModelError, match=r"net\.bin holds weights only"):
        surgeon.load(tmp_path / "net.bin")


@pytest.mark.usefixtures("with_numpy")
def test_messages_name_every_format(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"\.npz"):
        surgeon.save(_net(), tmp_path / "net.txt")
    (tmp_path / "net.txt").write_text("no model")
    with pytest.raises(ModelError, match="NumPy archives"):
        surgeon.load(tmp_path / "net.txt")


def test_without_that_file_there_is_no_such_format(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot tell from 'net\.npz' what to write"):
        surgeon.save(_net(), tmp_path / "net.npz")
    (tmp_path / "net.npz").write_bytes(b"NUMPY")
    with pytest.raises(ModelError, match="is not a model file that surgeon knows"):
        surgeon.load(tmp_path / "net.npz")


def test_a_file_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    net = _net()
    torch.save(net, tmp_path / "net.safetensors")
    assert isinstance(surgeon.load(tmp_path / "net.safetensors"), nn.Sequential)
    (tmp_path / "cut.safetensors").write_bytes(b"no header")
    with pytest.raises(ModelError, match=r"cut\.safetensors is damaged or cut short"):
        surgeon.load(tmp_path / "cut.safetensors")
    save_file(net.state_dict(), tmp_path / "net.pt")
    assert read_tensors(tmp_path / "net.pt")[0].keys() == net.state_dict().keys()
    torch.save(net.state_dict(), tmp_path / "old.any", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.any")[0].keys() == net.state_dict().keys()


def test_only_what_may_run_is_said_to_have_run(tmp_path: Path) -> None:
    net = _net()
    for name, says in (("net.pt", True), ("net.safetensors", False)):
        surgeon.save(net, tmp_path / name)
        _, notices = read_tensors(tmp_path / name, trust=surgeon.files.pickles.Trust(unsafe_pickle=True))
        assert any("has run" in notice for notice in notices) == says


def test_a_pt_needs_no_manifest(tmp_path: Path) -> None:
    net = surgeon.convert(_net(), "acnet", (1, 3, 8, 8))
    surgeon.save(net, tmp_path / "net.pt")
    assert history(surgeon.load(tmp_path / "net.pt")) == history(net) != ()
