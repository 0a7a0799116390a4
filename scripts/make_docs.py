"""Make what the documentation says of the program from the program: docs/cli.md, and what the README's commands print.

    python scripts/make_docs.py

`tests/test_docs.py` fails where either is out of date.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from surgeon.analysis import example as examples
from surgeon.app.cli import app
from surgeon.models import call as inputs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "cli.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def reference() -> str:
    """Write the reference of every command, in the order of `surgeon --help`."""
    root: Any = typer.main.get_command(app)
    source = "Made by `scripts/make_docs.py` from the program; `surgeon COMMAND --help` says the same."
    lines = ["# Commands", "", source, ""]
    for name, command in root.commands.items():
        lines += [f"## surgeon {name}", "", *_paragraphs(command.help)]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        if arguments:
            lines += ["| argument | meaning |", "|---|---|"]
            lines += [f"| `{p.metavar or p.name.upper()}` | {p.help or ''} |" for p in arguments] + [""]
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{', '.join(p.opts)}` | {p.help}{_default(p)} |" for p in options] + ["", command.epilog, ""]
    lines += ["## Example inputs", "", inputs.__doc__ or "", examples.__doc__ or ""]
    return "\n".join(lines).rstrip() + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield " ".join(paragraph.split())
        yield ""


def _default(option: Any) -> str:
    is_said = isinstance(option.default, int | float | str) and not isinstance(option.default, bool)
    return f" (default {option.default})" if is_said else ""


def with_outputs(readme: str) -> str:
    """Run the commands of the README's console blocks in one folder, in order, and write what they print below each."""
    with tempfile.TemporaryDirectory() as folder:
        return _BLOCK.sub(lambda block: _run_block(block[1], Path(folder)), readme)


def _run_block(text: str, folder: Path) -> str:
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    lines = [line for command in commands for line in (f"$ {command}", *_output(command, folder))]
    return "\n".join(["```console", *lines, "```"])


def _output(command: str, folder: Path) -> list[str]:
    """Run one command with this Python; standard error and standard output, as a terminal shows them."""
    words = shlex.split(command)
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", words[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150"}
    done = subprocess.run(words, cwd=folder, env=environment, text=True, capture_output=True, check=True)
    return [line.rstrip() for line in (done.stderr + done.stdout).splitlines()]


def main() -> None:
    REFERENCE.write_text(reference(), encoding="utf-8")
    README.write_text(with_outputs(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
