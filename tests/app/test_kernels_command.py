"""`surgeon kernels`: what it prints and draws, and one clear line for bad input."""

from __future__ import annotations

import builtins
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from torch import nn

import surgeon
from surgeon.app.cli import main
from surgeon.app.demo.net import SmallResNet
from surgeon.display import kernel_pictures


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in a folder of its own that holds net.pt and net.acnet.pt."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = SmallResNet(width=8)
    surgeon.save(net, "net.pt")
    surgeon.save(surgeon.convert(net, "acnet", example=(1, 1, 28, 28)), "net.acnet.pt")

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["kernels", *arguments])
        said = capsys.readouterr()
        return Ran(int(stop.value.code or 0), said.out, said.err)

    return call


@pytest.mark.parametrize("width", [40, 80, 120])
def test_it_fits_the_terminal_and_has_every_number(run, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run("net.pt", "net.acnet.pt", "net.pt")
    assert done.code == 0
    assert max(map(cell_len, done.out.splitlines())) <= width
    assert "(a) net.pt" in done.out
    figures = surgeon.kernels({"net.pt": surgeon.load("net.pt")}).networks[0]
    for row in (*figures.averages[0].matrix, *(figures.averages[0].untrained or ())):
        assert all(f"{value:.3f}".removeprefix("0") in done.out for value in row)
    if width >= 80:
        heading = next(line for line in done.out.splitlines() if line.startswith("(a) net.pt"))
        assert "(b) net.acnet.pt" in heading  # side by side
        assert "(c) net.pt (3)" in heading


def test_on_a_colour_terminal_cells_have_backgrounds(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" not in run("net.pt").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "48;2;" in run("net.pt").out


def test_layers_shows_every_conv_and_the_branches_of_blocks(run) -> None:
    done = run("net.acnet.pt", "--layers", "--no-control")
    assert all(path in done.out for path in ("conv1:", "layer3.0.conv2:", "ver_conv", "hor_conv"))
    assert "untrained" not in done.out
    assert "layer3.0.conv2:" not in run("net.acnet.pt").out


def test_json_is_what_the_function_gives(run) -> None:
    done = run("net.pt", "net.acnet.pt", "--json", "--seed", "3")
    data = json.loads(done.out)
    models = {name: surgeon.load(name) for name in ("net.pt", "net.acnet.pt")}
    assert data == json.loads(json.dumps(surgeon.kernels(models, seed=3).to_dict()))
    assert [network["label"] for network in data["networks"]] == ["(a)", "(b)"]


def test_a_png_is_a_picture(run) -> None:
    done = run("net.pt", "net.acnet.pt", "-o", "k.png")
    assert (done.code, "written: k.png" in done.err) == (0, True)
    with Image.open("k.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        colours = picture.convert("RGB").getcolors(2**24) or []
    assert len(colours) > 20  # matrices, and not one empty page
    run("net.pt", "net.acnet.pt", "-o", "k.png", "--layers", "--force")
    with Image.open("k.png") as larger:
        assert larger.size[1] > picture.size[1]


def test_an_svg_has_every_number_and_the_same_bytes_each_time(run) -> None:
    done = run("net.pt", "net.acnet.pt", "-o", "k.svg", "--json")
    assert done.code == 0
    text = Path("k.svg").read_text(encoding="utf-8")
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    said = "".join(ET.fromstring(text).itertext())
    for network in json.loads(done.out)["networks"]:
        for row in network["averages"][0]["matrix"]:
            assert all(f"{value:.3f}".removeprefix("0") in said for value in row)
    assert "(b) net.acnet.pt" in said
    assert "<dc:date>" not in text
    run("net.pt", "net.acnet.pt", "-o", "again.svg")
    assert Path("again.svg").read_text(encoding="utf-8") == text


def test_drawing_leaves_matplotlib_as_the_user_has_set_it(tmp_path: Path) -> None:
    import matplotlib

    def settings() -> dict[str, object]:  # to ask for the backend would choose one
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    was_there = sys.modules.get("matplotlib.pyplot")
    figures = surgeon.kernels(nn.Sequential(nn.Conv2d(3, 3, 3)))
    kernel_pictures.write(figures, tmp_path / "a.svg", "svg")
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": True, "svg.fonttype": "path"}):
        before = settings()
        kernel_pictures.write(figures, tmp_path / "b.svg", "svg")
        assert settings() == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()  # nor does that change the picture
    assert sys.modules.get("matplotlib.pyplot") is was_there  # which has windows, and figures that are kept


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    figures = surgeon.kernels({"$a_b$": nn.Sequential(nn.Conv2d(3, 3, 3)), "b$": nn.Sequential(nn.Conv2d(3, 3, 3))})
    kernel_pictures.write(figures, tmp_path / "k.svg", "svg")
    assert "(a) $a_b$" in list(ET.parse(tmp_path / "k.svg").getroot().itertext())  # not only in a comment


def test_many_convs_are_still_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 150 dots an inch, so many rows would be more pixels than Agg draws."""
    monkeypatch.setattr(kernel_pictures, "_MOST_DOTS", 1000)
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(8)))
    kernel_pictures.write(surgeon.kernels(net, control=False), tmp_path / "k.png", "png", layers=True)
    with Image.open(tmp_path / "k.png") as picture:
        assert 900 <= picture.size[1] <= 1000


def test_without_matplotlib_only_pictures_are_refused_and_before_any_work(run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def missing(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return own(name, *rest, **more)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("no-such-file.pt", "-o", "k.png")  # which nobody looks for
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "pip install 'conv-surgeon[plots]'" in done.err
    assert not Path("k.png").exists()
    assert run("net.pt").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such.pt",), "no-such.pt"),
        (("linear.pt",), "linear.pt has no conv whose kernel has more than one tap"),
        (("net.pt", "linear.pt", "-o", "k.svg"), "linear.pt has no conv"),
        (("net.pt", "-o", "k.jpg"), "End it in .png or .svg"),
        (("net.pt", "-o", "k"), "End it in .png or .svg"),
        (("net.pt", "-o", "taken.svg"), "taken.svg exists"),
        (("net.pt", "net.acnet.pt", "-o", "nowhere/k.svg"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(run, arguments: tuple[str, ...], said: str) -> None:
    surgeon.save(nn.Sequential(nn.Linear(3, 3)), "linear.pt")
    Path("taken.svg").write_text("mine")
    before = {path.name for path in Path().iterdir()}
    done = run(*arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""
    assert {path.name for path in Path().iterdir()} == before
    assert Path("taken.svg").read_text() == "mine"


def test_what_it_reads_is_not_overwritten(run) -> None:
    Path("net.pt").rename("net.svg")
    done = run("net.svg", "-o", "net.svg", "--force")
    assert (done.code, "made from" in done.err) == (2, True)


def test_force_overwrites(run) -> None:
    Path("k.svg").write_text("old")
    assert run("net.pt", "-o", "k.svg", "--force").code == 0
    assert Path("k.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_an_octave_network_is_seen_with_the_input_that_is_given(run) -> None:
    net = surgeon.convert(surgeon.load("net.pt"), "octave", example=(1, 1, 28, 28))
    surgeon.save(net, "net.octave.pt")
    data = json.loads(run("net.pt", "net.octave.pt", "--json", "-i", "2,1,32,32").out)
    assert data["networks"][0]["spectra"] == []
    assert data["networks"][1]["spectra"][0]["size"] == [32, 32]
    assert data["networks"][1]["is_drawn"] is True
    torch.save(torch.zeros(1, 1, 32, 32), "zeros.pt")
    zeros = json.loads(run("net.octave.pt", "--json", "-i", "zeros.pt").out)["networks"][0]
    assert zeros["is_drawn"] is False
    assert zeros["input"] == "1×1×32×32"
