"""A plan that rests on an input that nobody gave says so once, and how to give one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import nn

import surgeon

SIZED = {"rules": [{"swap": "acblock", "match": {"size": {"min": 16}}}]}
CASES = {
    "size": (SIZED, "`size` of rules[0] and all costs are for 1×3×224×224"),
    "min_size": ({"rules": [{"swap": "octave"}]}, "`min_size` of octave and all costs are for 1×3×224×224"),
    "costs": ({"rules": [{"swap": "acblock"}]}, "; all costs are for 1×3×224×224"),
}


def _net() -> nn.Module:
    convs = [nn.Conv2d(c_in, 8, 3, padding=1) for c_in in (3, 8, 8, 8)]
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.ReLU()))).eval()


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


@pytest.mark.parametrize("case", CASES)
def test_from_python_it_is_logged_once(case: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe, says = CASES[case]
    for command in (surgeon.plan, surgeon.convert):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="surgeon"):
            command(_net(), recipe)
        (warning,) = _warnings(caplog)
        assert says in warning
        assert "pass --input 1,3,H,W (from Python, example=)" in warning
        caplog.clear()
        command(_net(), recipe, (1, 3, 32, 32))
        assert not _warnings(caplog)


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_the_command_line_says_it_once_on_standard_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_net(), "m.pt")
    assert run_surgeon(command, "m.pt", "-r", "octave") == 0
    out, err = capsys.readouterr()
    assert err.count("1×3×224×224") == 1
    assert err.startswith("warning: no --input was given; `min_size` of octave")
    assert "no --input" not in out
    output = "x.pt" if command == "convert" else "x.yaml"
    assert run_surgeon(command, "m.pt", "-r", "octave", "-i", "1,3,32,32", "-o", output) == 0
    assert "--input" not in capsys.readouterr().err
    assert run_surgeon("survey", "m.pt") == 0
    assert capsys.readouterr().err.startswith("note: no --input was given; surgeon uses 1×3×224×224")
