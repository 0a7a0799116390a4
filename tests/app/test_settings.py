"""Standing choices: where they come from, which of them counts, and what a downloaded folder cannot choose."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon

from surgeon.app import settings
from surgeon.errors import RecipeError, StoreError

INSTALLED = "segmentation_models_pytorch"
CODE = """
from pathlib import Path
Path("ran").touch()
from torch import nn
class Net(nn.Sequential):
    pass
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and beside it the code that its pickle names."""
    monkeypatch.chdir(tmp_path)
    for name in ("SURGEON_ALLOW", "SURGEON_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "code_beside.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import code_beside  # type: ignore[import-not-found]

    torch.save(code_beside.Net(torch.nn.Conv2d(3, 4, 3)), "m.pt")
    del sys.modules["code_beside"]
    sys.path.remove(str(tmp_path))
    (tmp_path / "ran").unlink()
    return tmp_path


def _write(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


def test_without_any_choice_nothing_is_allowed_and_the_cpu_is_used(home: Path) -> None:
    assert settings.allowed(None) == ()
    assert settings.device(None) == "cpu"


def test_the_command_line_comes_first_then_the_environment_then_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(home, f'[tool.surgeon]\nallow = ["{INSTALLED}"]\ndevice = "mps"\n')
    assert settings.allowed(None) == (INSTALLED,)
    assert settings.device(None) == "mps"
    monkeypatch.setenv("SURGEON_ALLOW", " one, two.three ,")
    monkeypatch.setenv("SURGEON_DEVICE", "cuda")
    assert settings.allowed(None) == ("one", "two.three")
    assert settings.device(None) == "cuda"
    assert settings.allowed(["four"]) == ("four",)
    assert settings.device("cpu") == "cpu"
    monkeypatch.setenv("SURGEON_ALLOW", "")  # says that nothing is allowed
    assert settings.allowed(None) == ()


def test_the_nearest_file_above_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(home, '[tool.surgeon]\ndevice = "cuda"\n')
    (home / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(home / "a" / "b")
    assert settings.device(None) == "cuda"
    _write(home / "a", "[tool.other]\n")
    assert settings.device(None) == "cpu"


@pytest.mark.parametrize("as_module", [True, False])
def test_a_file_beside_a_model_cannot_make_its_code_run(
    home: Path, as_module: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if as_module:  # `python -m surgeon` searches the current folder first
        monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    _write(home, '[tool.surgeon]\nallow = ["code_beside"]\n')
    assert run_surgeon("survey", "m.pt", "-i", "1,3,8,8") == 2
    said = capsys.readouterr().err
    assert "allows code_beside, which is not installed, so that does not count; pass --allow code_beside" in said
    assert not Path("ran").exists()


def test_what_the_user_allows_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_ALLOW", "code_beside")
    try:
        assert run_surgeon("survey", "m.pt", "-i", "1,3,8,8") == 0
        assert Path("ran").exists()
    finally:
        sys.modules.pop("code_beside", None)


def test_code_beside_does_not_stand_in_for_an_installed_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(home, f'[tool.surgeon]\nallow = ["{INSTALLED}"]\n')
    assert settings.allowed(None) == (INSTALLED,)
    Path(f"{INSTALLED}.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    assert settings.allowed(None) == ()


def test_a_folder_without_code_of_its_own_is_no_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "spaces").mkdir()
    monkeypatch.setattr(sys, "path", ["/nowhere", str(home), *sys.path])
    _write(home, '[tool.surgeon]\nallow = ["spaces"]\n')
    assert settings.allowed(None) == ()  # others could add to it


@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_file_that_others_may_write_allows_nothing(
    home: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write(home, f'[tool.surgeon]\nallow = ["{INSTALLED}"]\n')
    if how == "mode":
        path.chmod(0o666)
    elif os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with caplog.at_level(logging.WARNING, logger="surgeon"):
        assert settings.allowed(None) == ()
    assert f"is not yours alone, so what it allows does not count; pass --allow {INSTALLED}" in caplog.text


BAD = {
    'alow = ["x"]': r"alow: unknown key 'alow'; there are allow, device \(did you mean 'allow'\?\)",
    'allow = "x"': "allow: 'x' is not a list",
    "allow = [1]": "1 is not text",
    'allow = ["a-b"]': "'a-b' is not the name of a package",
    "device = 3": "device: 3 is not text",
    'device = ""': "device: '' is empty",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_in_the_table_is_said(home: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _write(home, f"[tool.surgeon]\n{line}\n")
    with pytest.raises(RecipeError, match=BAD[line]) as caught:
        settings.device(None)
    assert "pyproject.toml: [tool.surgeon]" in str(caught.value)
    assert run_surgeon("survey", "m.pt") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"[tool.surgeon", b"\xff", b"a = " + b"[" * 100_000], ids=["cut", "bytes", "deep"])
def test_a_file_that_is_no_toml_is_said(home: Path, content: bytes) -> None:
    (home / "pyproject.toml").write_bytes(content)
    with pytest.raises(StoreError, match=r"pyproject\.toml is not TOML: .*Mend it"):
        settings.allowed(None)


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nsurgeon = 3"])
def test_tables_that_are_none(home: Path, text: str) -> None:
    _write(home, text)
    if text == "tool = 3":
        assert settings.device(None) == "cpu"
    else:
        with pytest.raises(RecipeError, match="is not a table"):
            settings.device(None)


def test_a_wrong_name_in_the_environment_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_ALLOW", "my pkg")
    with pytest.raises(RecipeError, match="SURGEON_ALLOW: allow: 'my pkg' is not the name of a package"):
        settings.allowed(None)
