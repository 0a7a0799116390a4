"""What reaches the terminal: results on standard output alone, and no text of a file or user that steers it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.app import terminal
from surgeon.errors import PlanError, RecipeError, StoreError, printable
from surgeon.recipes import recipe as recipes

NAMES = {
    "markup": "[bold]x[/red] :bomb:",
    "escape": "esc\x1b[2J\x1b]0;title\x07",
    "newline": "one\nsurgeon: two\r",
    "c1": "c1\x9b31m",
    "bidi": "a\u202etp_lived\u2066",
    "half": "half\udc80",
}
SHOWN = {
    "markup": "[bold]x[/red] :bomb:",
    "escape": r"esc\x1b[2J\x1b]0;title\x07",
    "newline": r"one\nsurgeon: two\r",
    "c1": r"c1\x9b31m",
    "bidi": r"a\u202etp_lived\u2066",
    "half": r"half\udc80",
}


def _net(name: str) -> nn.Module:
    net = nn.Sequential()
    net.add_module(name, nn.Conv2d(3, 4, 3, padding=1))
    net.add_module(f"{name} norm", nn.BatchNorm2d(4))
    net.add_module("last", nn.Conv2d(4, 4, 3, padding=1))
    return net.eval()


def _is_clean(text: str) -> bool:
    return printable(text, keep="\n") == text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_modules_are_text_in_every_view(home: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, said = NAMES[kind], SHOWN[kind]
    torch.save(_net(name), "m.pt")
    broken = _net(name)
    torch.save(broken, "other.pt")
    rules = [{"leave": f"see {name}", "match": {"name": "last"}}, {"swap": "acblock"}]
    Path("r.json").write_text(json.dumps({"surgeon": 1, "title": "t", "rules": rules}))
    commands = {
        "survey m.pt": 0,
        "plan m.pt -r acnet": 0,
        "convert m.pt -r acnet": 0,
        "fuse m.acnet.pt": 0,
        "verify m.acnet.pt m.acnet.fused.pt": 0,
        "verify m.pt other.pt": 1,
        "survey m.pt --json": 0,
        "plan m.pt -r acnet -o p.json": 0,
    }
    if kind not in ("half", "c1", "newline", "escape"):  # which no recipe may hold as they are
        commands["plan m.pt -r r.json"] = 0
    for command, code in commands.items():
        capsys.readouterr()
        assert run_surgeon(*command.split(), "-i", "1,3,8,8") == code, command
        out, err = capsys.readouterr()
        assert _is_clean(err)
        if command.endswith("--json"):
            assert name in [path for conv in json.loads(out)["convs"] for path in conv["paths"]]  # exactly
        else:
            assert _is_clean(out)
            assert said in out or "fuse" in command


def test_a_plan_as_json_is_read_again_whatever_the_names_hold(home: Path) -> None:
    for kind in set(NAMES) - {"half"}:
        plan = surgeon.plan(_net(NAMES[kind]), "acnet", (1, 3, 8, 8))
        for as_json in (True, False):
            assert surgeon.surgery.plan.parse(plan.dump(as_json=as_json), "p").convs == plan.convs
    plan = surgeon.plan(_net(NAMES["half"]), "acnet", (1, 3, 8, 8))
    with pytest.raises(RecipeError, match="half a character"):
        surgeon.surgery.plan.parse(plan.dump(as_json=True), "p")


HOSTILE = "x\x1b[31m\n\u202e\x07"
CALLS: dict[str, Callable[[], object]] = {
    "a path": lambda: surgeon.load(f"{HOSTILE}.pt"),
    "an architecture": lambda: surgeon.load(f"torchvision:{HOSTILE}"),
    "a recipe": lambda: recipes.load(HOSTILE),
    "a block": lambda: recipes.from_dict({"rules": [{"swap": HOSTILE}]}),
    "a key": lambda: recipes.from_dict({"rules": [{"swap": "acblock", HOSTILE: 1}]}),
    "an output": lambda: surgeon.save(nn.Conv2d(3, 3, 3), f"no/{HOSTILE}.pt"),
    "an example": lambda: surgeon.plan(nn.Conv2d(3, 3, 3), "acnet", HOSTILE),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CALLS)
def test_no_error_can_steer_a_terminal(home: Path, case: str) -> None:
    with pytest.raises(surgeon.SurgeonError) as caught:
        CALLS[case]()
    assert _is_clean(str(caught.value))
    assert "\nsurgeon" not in str(caught.value)


def test_errors_of_several_lines_keep_their_lines_and_no_others() -> None:
    error = PlanError("it does not fit", details=["one\nfake", "two"], todo="Mend it.")
    assert str(error).split("\n") == ["it does not fit:", r"  one\nfake", "  two. Mend it."]
    with pytest.raises(RecipeError) as caught:
        recipes.from_dict({"rules": [{"swap": "a\nb"}, {"swap": "c"}]})
    assert str(caught.value).count("\n") == 2


def test_notes_and_warnings_are_told_apart_and_are_text(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("surgeon")
    with terminal.notes():
        log.info("[red]a[/red] :bomb: \x1b[31m")
        log.warning("b\nc")
    assert capfd.readouterr().err == "note: [red]a[/red] :bomb: \\x1b[31m\nwarning: b\\nc\n"


@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--help"])
def test_no_room_for_what_is_printed_is_one_line_and_exit_2(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = _surgeon(*arguments.split(), stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "surgeon: cannot write to standard output: No space left on device. Make room, or write it elsewhere.\n"
    )


def _surgeon(*arguments: str, stdout: IO[str] | int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surgeon", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120)


def test_nobody_reads_is_no_verdict(home: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = _surgeon("recipes", stdout=write)
    os.close(write)
    assert done.returncode == 141  # 1 would say that two models differ
    assert done.stderr == ""


class _Narrow(io.TextIOWrapper):
    """An output whose encoding has few characters."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding)

    def printed(self) -> str:
        self.flush()
        raw = self.buffer.getvalue()  # type: ignore[attr-defined]
        return str(raw.decode(self.encoding))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_lacks_characters_gets_them_escaped(
    home: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", table := _Narrow(encoding))
    assert run_surgeon("recipes") == 0
    assert "acnet" in table.printed()
    torch.save(_net("→"), "m.pt")
    for arguments in (("survey", "m.pt", "-i", "1,3,8,8"), ("survey", "m.pt", "-i", "1,3,8,8", "--json")):
        monkeypatch.setattr(sys, "stdout", screen := _Narrow(encoding))
        assert run_surgeon(*arguments) == 0
        if "--json" in arguments:
            assert json.loads(screen.printed())["convs"][0]["paths"] == ["→"]
        else:
            assert r"\u2192" in screen.printed()


def test_usage_errors_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("survey", "m.pt", "--\x1b[31mred") == 2
    assert r"No such option: --\x1b[31mred" in capsys.readouterr().err


def test_what_others_print_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty() -> dict[str, object]:
        print("a package says hello")
        return {}

    monkeypatch.setattr("surgeon.blocks.registry", chatty)
    assert run_surgeon("blocks", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert err == "a package says hello\n"


def test_a_network_of_the_user_that_prints_does_not_spoil_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("chatty_net.py").write_text(
        "print('imported')\nfrom torch import nn\ndef Net():\n    print('built')\n    return nn.Conv2d(3, 3, 3)\n"
    )
    assert run_surgeon("survey", "chatty_net.py:Net", "-i", "1,3,8,8", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["convs"]
    assert err.splitlines()[:2] == ["imported", "built"]


def test_a_file_that_is_printed_stays_exact_in_a_file_and_is_safe_on_a_terminal() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, shown in ((io.StringIO(), "a\x1b[31m\r\n"), (Screen(), "a\\x1b[31m\n")):
        terminal._results.append(screen)
        try:
            terminal.show_file("a\x1b[31m\r\n")
        finally:
            terminal._results.pop()
        assert screen.getvalue() == shown


def test_what_is_printable_stays_as_it_is() -> None:
    assert printable("Grüße, 日本語, می‌خواهم 👩‍🔬") == "Grüße, 日本語, می‌خواهم 👩‍🔬"
    assert printable("\U000e0041\u200b\u2028\x7f\t") == r"\U000e0041\u200b\u2028\x7f\t"
    assert printable("\ufffe\ufdd0\U0001ffff") == r"\ufffe\ufdd0\U0001ffff"  # these are no characters
    assert str(StoreError("a\n", todo="b\x1b")) == r"a\n. b\x1b"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:131] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["Python's", "torch's", "a GPU's"],
)
def test_a_want_of_memory_is_no_bug(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.complain_of(error) == 2
    assert capsys.readouterr().err == (
        "surgeon: there is not enough memory for this. Give a smaller --input, or use a machine that has more.\n"
    )
    assert terminal.complain_of(ValueError("x")) == 70
