"""The command line: what it prints where, its exit codes, and one clear line for bad input."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from helpers import run_surgeon
from rich.console import Console
from rich.progress import Progress, TaskID
from safetensors.torch import save_file
from torch import nn

import surgeon
from surgeon.app import terminal
from surgeon.app.cli import app, main
from surgeon.app.demo.net import SmallResNet
from surgeon.display.report import report_view

COMMANDS = (
    *("convert", "fit", "fuse", "verify", "survey", "plan", "bench", "kernels", "report", "recipes"),
    *("blocks", "demo"),
)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a folder of its own that holds net.pt."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(SmallResNet(), "net.pt")

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def test_the_whole_path(run, tmp_path: Path) -> None:
    assert run("convert", "net.pt", "--recipe", "acnet.yaml").code == 0
    assert run("fuse", "net.acnet.pt").code == 0
    verified = run("verify", "net.acnet.pt", "net.acnet.fused.pt")
    assert verified.code == 0
    assert verified.out.splitlines()[-1].startswith("equivalent")
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt", "net.acnet.pt", "net.acnet.fused.pt"}


def test_a_plan_brings_its_input(run) -> None:
    assert run("plan", "net.pt", "--recipe", "acnet", "-i", "2,1,33,40", "-o", "plan.yaml").code == 0
    converted = run("convert", "net.pt", "--plan", "plan.yaml")
    assert converted.code == 0
    assert "no --input was given" not in converted.err
    assert "2×1×33×40" in converted.out


def test_a_plan_is_written_edited_and_carried_out(run, tmp_path: Path) -> None:
    assert run("plan", "net.pt", "--recipe", "acnet", "-o", "plan.yaml").code == 0
    head, *entries = Path("plan.yaml").read_text().split("\n- path:")
    assert entries[1].startswith(" layer1.0.conv1\n")
    Path("plan.yaml").write_text("\n- path:".join([head, entries[0], *entries[2:]]))
    assert run("convert", "net.pt", "--plan", "plan.yaml").code == 0
    kinds = {name: type(m).__name__ for name, m in surgeon.load("net.acnet.pt").named_modules()}
    assert kinds["conv1"] == "ACBlock"
    assert kinds["layer1.0.conv1"] == "Conv2d"
    assert kinds["layer1.0.conv2"] == "ACBlock"


@pytest.mark.parametrize(
    "arguments",
    [
        ("survey", "net.pt"),
        ("plan", "net.pt", "-r", "acnet"),
        ("convert", "net.pt", "-r", "acnet"),
        ("fuse", "net.pt"),
        ("verify", "net.pt", "net.pt"),
        ("recipes",),
        ("recipes", "--schema"),
        ("blocks",),
        ("demo", "--seconds", "1"),
    ],
    ids=lambda arguments: " ".join(arguments[::2]),
)
def test_json_is_one_document_on_stdout(run, arguments: tuple[str, ...]) -> None:
    json_flag = () if "--schema" in arguments else ("--json",)
    result = run(*arguments, *json_flag)
    assert result.code == 0, result.err
    json.loads(result.out)


def test_notices_go_to_stderr(run) -> None:
    result = run("survey", "net.pt")
    assert "no --input was given" in result.err
    assert "no --input was given" not in result.out
    assert "layer3.0.conv2" in result.out


def test_the_logger_is_left_as_it_was(run) -> None:
    logger = logging.getLogger("surgeon")
    before = (logger.level, list(logger.handlers))
    assert run("survey", "net.pt").code == 0
    assert run("survey", "nte.pt").code == 2
    assert (logger.level, list(logger.handlers)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("survey", "net.pt"),
        ("plan", "net.pt", "-r", "acnet"),
        ("convert", "net.pt", "-r", "acnet"),
        ("fuse", "net.pt"),
        ("verify", "net.pt", "net.pt"),
        ("bench", "net.pt", "--rounds=3", "--batch=1", "--batch=2"),
        ("demo", "--seconds=1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_bar_on_a_terminal_says_what_is_done_and_runs_forward(
    run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "_err", Console(file=screen, force_terminal=True, width=150, highlight=False))
    seen: list[tuple[str, float]] = []
    update = Progress.update

    def note(self: Progress, task: TaskID, *, description: str, completed: float) -> None:
        seen.append((description, completed))
        update(self, task, description=description, completed=completed, refresh=True)

    monkeypatch.setattr(Progress, "update", note)
    assert run(*arguments).code == 0
    words, shares = zip(*seen, strict=True)
    assert words[0].startswith("loading")
    assert len(words) >= 3
    assert list(shares) == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert words[-1] in screen.getvalue()
    kind = "warning" if arguments[0] in ("plan", "convert") else "note"  # there it decides what is done
    is_told = f"{kind}: no --input was given" in screen.getvalue()
    assert is_told == (arguments[0] not in ("verify", "demo"))


def test_what_a_model_prints_does_not_spoil_the_json(run, tmp_path: Path) -> None:
    Path("chatty.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(torch.nn.Conv2d(3, 4, 3))\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
    )
    result = run("survey", "chatty.py:Net", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["convs"][0]["paths"] == ["0"]


BAD = {
    "no such file": (("survey", "nte.pt"), "net.pt"),
    "a directory": (("survey", "."), ""),
    "an empty file": (("survey", "empty.pt"), "empty"),
    "a text file": (("survey", "text.pt"), "text.pt"),
    "a truncated file": (("survey", "cut.pt"), "cut.pt"),
    "weights alone": (("survey", "weights.safetensors"), "--arch"),
    "no such recipe": (("convert", "net.pt", "-r", "acnte"), "acnet"),
    "a recipe with errors": (("convert", "net.pt", "-r", "bad.yaml"), "bad.yaml:3:16: rules[0].swap"),
    "a folder as recipe": (("convert", "net.pt", "-r", "."), ""),
    "no such plan": (("convert", "net.pt", "--plan", "none.yaml"), "none.yaml"),
    "a recipe for a plan": (("convert", "net.pt", "--plan", "bad.yaml"), "bad.yaml"),
    "neither recipe nor plan": (("convert", "net.pt"), "--recipe"),
    "both": (("convert", "net.pt", "-r", "acnet", "--plan", "p.yaml"), "--recipe"),
    "a bad override": (("convert", "net.pt", "-r", "acnet", "--set", "rules[9].with.init=split"), "rules"),
    "a bad value": (("convert", "net.pt", "-r", "acnet", "--set", "rules[0].with.init=splt"), "split"),
    "a bad shape": (("survey", "net.pt", "--input", "1,3,a"), "1,3,224,224"),
    "a shape that does not fit": (("convert", "net.pt", "-r", "acnet", "--input", "1,3,28,28"), "--input"),
    "a bad output name": (("convert", "net.pt", "-r", "acnet", "-o", "out.xyz"), ".pt"),
    "an output that exists": (("convert", "net.pt", "-r", "acnet", "-o", "linear.pt"), "--force"),
    "an output that is the input": (("convert", "net.pt", "-r", "acnet", "-o", "net.pt", "--force"), "made from"),
    "two inputs where one is meant": (("survey", "net.pt", "-i", "1,1,28,28", "-i", "2,1,28,28"), "only verify"),
    "an input that fits nowhere": (("survey", "net.pt", "-i", "1,1,99999999,99999999"), "memory"),
    "a seed that is too large": (("survey", "net.pt", "--seed", "9" * 30), "--seed"),
    "an unknown command": (("cnovert", "net.pt"), ""),
    "an unknown option": (("survey", "net.pt", "--nope"), ""),
    "an unknown network": (("survey", "torchvision:resnet81"), "resnet18"),
    "a model to verify that is not there": (("verify", "net.pt", "no.pt"), "no.pt"),
    "no conv to swap": (("convert", "linear.pt", "-r", "acnet"), ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_exit_2_and_writes_nothing(run, case: str, tmp_path: Path) -> None:
    Path("empty.pt").touch()
    Path("text.pt").write_text("hello")
    Path("cut.pt").write_bytes(Path("net.pt").read_bytes()[:5000])
    Path("bad.yaml").write_text("surgeon: 1\ntitle: T\nrules: [{swap: acblok}]\n")
    torch.save(nn.Sequential(nn.Linear(3, 3)), "linear.pt")
    save_file(SmallResNet().state_dict(), "weights.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments, says = BAD[case]
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert says in result.err
    assert "Traceback" not in result.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_exit_code_1_for_different_models(run) -> None:
    torch.manual_seed(1)
    torch.save(SmallResNet(), "other.pt")
    assert run("verify", "net.pt", "other.pt").code == 1


def test_a_fault_of_ours_is_70_and_keeps_the_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.proof.calls.local_distance", lambda *_: 1.0)
    result = run("convert", "net.pt", "-r", "acnet")
    assert result.code == 70
    assert "Traceback" in result.err
    assert "convert" in result.err
    assert not Path("net.acnet.pt").exists()


def test_a_fault_that_nobody_foresaw_is_70_too(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.proof.verify.verify", lambda *_, **__: 1 / 0)
    result = run("verify", "net.pt", "net.pt")
    assert result.code == 70  # 1 would say that they differ
    assert "ZeroDivisionError" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_in_an_example_that_parses(run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    last = result.out.strip().split("\n\n")[-1]
    assert last.strip().startswith(f"Example: surgeon {command}")


def test_all_commands_are_known_here() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=120)


def test_help_and_import_do_not_import_torch() -> None:
    code = "import sys, surgeon, surgeon.app.cli\ntry: surgeon.app.cli.main(['--help'])\nexcept SystemExit: pass\n"
    done = _python("-c", code + "print('torch' in sys.modules, 'pydantic' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False False"


def test_python_dash_m_is_the_same_program() -> None:
    assert _python("-m", "surgeon", "--version").stdout.strip() == f"surgeon {surgeon.__version__}"


def test_colours_only_on_a_terminal_and_never_with_no_color(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in run("verify", "net.pt", "net.pt").out
    net = SmallResNet()
    view = report_view(surgeon.verify(net, net, (1, 1, 28, 28)))

    def printed(no_color: str) -> str:
        monkeypatch.setenv("NO_COLOR", no_color)  # an empty one does not count
        screen = io.StringIO()
        Console(file=screen, force_terminal=True).print(view)
        return screen.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[3" in printed("")
    assert "\x1b[3" not in printed("1")


def test_the_demo_overwrites_nothing(run) -> None:
    before = Path("net.pt").read_bytes()
    result = run("demo", "--seconds", "1", "--keep", ".")
    assert result.code == 2
    assert "net.pt exists. Name another folder" in result.err
    assert Path("net.pt").read_bytes() == before
    assert run("demo", "--keep", "net.pt/folder").code == 2


def test_a_signal_ends_a_command_with_its_exit_code(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("surgeon.files.formats.pt.torch.save", interrupted)
    result = run("convert", "net.pt", "-r", "acnet")
    assert result.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; no file is left half-written" in result.err
    assert {path.name for path in Path().iterdir()} == {"net.pt"}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("way", ["swallowed", "turned into another error"])
def test_code_that_catches_a_signal_does_not_keep_it(run, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def stubborn(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except BaseException:
            if way != "swallowed":
                raise RuntimeError("torch cannot close its archive") from None

    monkeypatch.setattr("surgeon.files.formats.pt.torch.save", stubborn)
    assert run("convert", "net.pt", "-r", "acnet").code == 128 + signal.SIGINT


def test_the_demo_tells_each_step(run) -> None:
    start = time.monotonic()
    result = run("demo", "--seconds", "1", "--keep", "kept", "--json")
    assert time.monotonic() - start < 60
    demo = json.loads(result.out)
    accuracies = [step["accuracy"] for step in demo["steps"]]
    assert accuracies[0] == accuracies[1]  # conversion keeps what was learnt
    assert accuracies[2] == accuracies[3]  # and so does folding
    assert min(accuracies) > 0.85
    assert demo["report"]["equivalent"]
    page = Path(demo["page"]).read_text(encoding="utf-8")
    assert Path(demo["page"]) == Path("kept/report.html")
    assert "net.acnet.trained.fused.pt" in page
    assert "✓ equivalent" in page
    trained, converted, fitted = demo["octave"]
    assert trained == demo["steps"][0]
    assert trained["accuracy"] - converted["accuracy"] > 0.15  # conversion alone loses much
    assert trained["accuracy"] - fitted["accuracy"] < 0.02  # fitting gives back nearly all of it
    assert converted["macs"] == fitted["macs"] < 0.75 * trained["macs"]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    said = re.search(r"\(([\d.]+) %\) has ([\d.]+) % as octaves, and ([\d.]+) % once", readme)
    assert said is not None
    found = [100 * step["accuracy"] for step in demo["octave"]]
    assert found == pytest.approx([float(one) for one in said.groups()], abs=0.5)  # two of 500 images
    assert sorted(path.name for path in Path("kept").iterdir()) == [
        "net.acnet.pt",
        "net.acnet.trained.fused.pt",
        "net.acnet.trained.pt",
        "net.images.safetensors",
        "net.octave.fit.pt",
        "net.octave.pt",
        "net.pt",
        "report.html",
    ]
    assert len({path.stat().st_mode for path in Path("kept").iterdir()}) == 1  # all that the umask gives


def test_fuse_counts_what_is_folded_and_says_what_stays_a_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convs = [nn.Conv2d(16, 16, 3, padding=1, groups=groups) for groups in (1, 16, 1)]
    net = nn.Sequential(nn.Conv2d(3, 16, 1), *convs, nn.Conv2d(16, 16, 1)).eval()
    torch.save(surgeon.convert(net, "octave", (1, 3, 64, 64)), tmp_path / "net.pt")
    assert run_surgeon("fuse", tmp_path / "net.pt", "-o", tmp_path / "fused.pt") == 0
    done = capsys.readouterr()
    assert "folded: 3 blocks" in done.out
    assert "1 octave block of convs with groups not folded; the norms behind are folded in" in done.err
