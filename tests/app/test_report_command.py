"""`surgeon report` and `--html`: a page in a file, claimed before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgeon
from surgeon.app.cli import main

SHAPE = "1,3,16,16"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    surgeon.save(net(), "net.pt")
    return tmp_path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_a_model_is_shown_with_what_a_recipe_would_make_of_it(folder: Path) -> None:
    assert run("report", "net.pt", "-r", "acnet", "-i", SHAPE) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "1 of 2" in text
    assert "net.pt" in text
    assert str(folder) not in text  # the page can be given away


def test_every_command_that_can_writes_its_page(folder: Path) -> None:
    assert run("plan", "net.pt", "-r", "acnet", "-i", SHAPE, "--html", "plan.html") == 0
    assert run("convert", "net.pt", "-r", "acnet", "-i", SHAPE, "--html", "convert.html") == 0
    assert run("fuse", "net.acnet.pt", "--html", "fuse.html") == 0
    assert run("verify", "net.acnet.pt", "net.acnet.fused.pt", "--html", "verify.html") == 0
    assert run("bench", "net.pt", "--rounds", "3", "-i", SHAPE, "--html", "bench.html") == 0
    said = {
        name: (folder / f"{name}.html").read_text(encoding="utf-8") for name in ("plan", "convert", "fuse", "verify")
    }
    assert "nothing is changed yet" in said["plan"]
    assert 'data-state="swapped"' in said["convert"]
    assert 'data-state="folded"' in said["fuse"]
    assert "equivalent" in said["verify"]
    assert (folder / "bench.html").exists()


def test_two_models_are_compared_and_differing_ones_are_shown_as_well(folder: Path) -> None:
    other = net()
    nn.init.zeros_(other[3].weight)
    surgeon.save(other, "other.pt")
    assert run("report", "net.pt", "other.pt", "-i", SHAPE) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "✗ different" in text
    assert run("verify", "net.pt", "other.pt", "-i", SHAPE, "--html", "v.html") == 1
    assert (folder / "v.html").exists()


def test_a_file_that_holds_a_program_is_compared_and_not_looked_into(folder: Path) -> None:
    pytest.importorskip("onnxscript")
    assert run("fuse", "net.pt", "-i", SHAPE, "-o", "net.onnx") == 0
    assert run("report", "net.onnx", "-o", "alone.html") == 0
    assert "a file that holds a program" in (folder / "alone.html").read_text(encoding="utf-8")
    assert run("report", "net.pt", "net.onnx", "-i", SHAPE) == 0
    assert "✓ equivalent" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report", "net.pt", "-o", "page.txt"), "End it in .html"),
        (("report", "net.pt", "-o", "taken.html"), "taken.html exists"),
        (("report", "nowhere.pt"), "no file nowhere.pt"),
        (("report", "net.pt", "-r", "acnet", "--plan", "p.yaml"), "either --recipe or --plan"),
        (("plan", "net.pt", "-r", "acnet", "--html", "taken.html"), "taken.html exists"),
        (("convert", "net.pt", "-r", "acnet", "--html", "page.txt"), "End it in .html"),
        (("convert", "net.pt", "-r", "acnet", "--html", "taken.html"), "taken.html exists"),
        (("fuse", "net.pt", "--html", "taken.html"), "taken.html exists"),
        (("fuse", "net.pt", "--html", "nowhere/page.html"), "there is no folder"),
        (("verify", "net.pt", "net.pt", "--html", "taken.html"), "taken.html exists"),
        (("bench", "net.pt", "--html", "taken.html"), "taken.html exists"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    (folder / "taken.html").write_text("mine")
    before = sorted(folder.iterdir())
    assert run(*words) == 2
    assert said in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
    assert (folder / "taken.html").read_text() == "mine"
