"""A block of another distribution: its class is admitted when a pickle names exactly that, and nothing else of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_pickle
from torch import nn

import surgeon
from surgeon import blocks
from surgeon.errors import ModelError
from surgeon.files.save import to_open_again

CODE = """
import torch
from torch import nn
from surgeon.blocks.acblock import ACBlock

class Twin(ACBlock):
    __module__ = "twins.block"
    name = "twin"

class Other(nn.ReLU):
    pass

class Loader(nn.Module):
    def __setstate__(self, state):
        open("ran", "w")
        super().__setstate__(state)

def function(): ...
"""


@pytest.fixture
def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    """A distribution `twins` that offers the block `twins.block.Twin`."""
    (tmp_path / "lib" / "twins").mkdir(parents=True)
    (tmp_path / "lib" / "twins" / "__init__.py").touch()
    (tmp_path / "lib" / "twins" / "block.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    import twins.block

    offered = {**blocks.registry(), "twin": twins.block.Twin}
    monkeypatch.setattr(blocks, "registry", lambda: offered)
    yield twins.block.Twin
    for name in [name for name in sys.modules if name.partition(".")[0] == "twins"]:
        del sys.modules[name]


def _twin(kind: type[nn.Module]) -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    options = kind.Options.model_validate({"init": "split"})
    return kind.from_conv(conv, options, norm=None, generator=torch.Generator()).eval()


def test_a_block_that_is_offered_is_admitted(twins: type[nn.Module]) -> None:
    model = nn.Sequential(_twin(twins), nn.ReLU())
    surgeon.save(model, Path("net.pt"))
    again = surgeon.load("net.pt")
    assert type(again[0]) is twins
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert to_open_again(model, Path("net.pt"), None) is None


def test_it_is_not_without_being_offered(twins: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(_twin(twins))
    surgeon.save(model, Path("net.pt"))
    monkeypatch.setattr(blocks, "registry", dict)
    with pytest.raises(ModelError, match=r"twins\.block\.Twin .outside the admitted packages.*--allow twins"):
        surgeon.load("net.pt")
    assert "--allow twins" in str(to_open_again(model, Path("net.pt"), None))


@pytest.mark.parametrize("name", ["Other", "Loader", "function", "Twin.__init__", "nn.Linear"])
def test_nothing_else_of_its_package_is(name: str, twins: type[nn.Module]) -> None:
    write_pickle(Path("named.pt"), f"ctwins.block\n{name}\n".encode())
    with pytest.raises(ModelError, match=rf"twins\.block\.{re.escape(name)} .outside the admitted packages"):
        surgeon.load("named.pt")


def test_the_rest_of_its_package_does_not_load(twins: type[nn.Module]) -> None:
    module = sys.modules[twins.__module__]
    torch.save(nn.Sequential(_twin(twins), module.Loader()), "net.pt")
    with pytest.raises(ModelError, match=r"twins\.block\.Loader"):
        surgeon.load("net.pt")
    assert not Path("ran").exists()


def test_what_has_only_its_name_is_refused(twins: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(nn.Sequential(_twin(twins)), "net.pt")
    fake = type("Fake", (nn.ReLU,), {"__module__": "twins.block", "__qualname__": "Fake"})
    monkeypatch.setattr(sys.modules["twins.block"], "Twin", fake)
    with pytest.raises(ModelError, match=r"twins\.block\.Twin .really twins\.block\.Fake"):
        surgeon.load("net.pt")


def test_no_block_can_be_stored_as_a_value(twins: type[nn.Module]) -> None:
    model = nn.Sequential(_twin(twins))
    model.kind = twins
    torch.save(model, "net.pt")
    with pytest.raises(ModelError, match=r"stores twins\.block\.Twin itself"):
        surgeon.load("net.pt")


def test_blocks_are_not_looked_for_where_no_file_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> None:
        raise AssertionError("looked for blocks")

    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "net.pt")
    monkeypatch.setattr(blocks, "registry", look)
    assert surgeon.load(tmp_path / "net.pt")
