"""Generate the documentation that comes from the program: docs/cli.md, docs/schemas, and what the README prints.

    python scripts/make_docs.py

`tests/test_docs.py` fails if any of it is out of date.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from surgeon.analysis import example as examples
from surgeon.app.cli import app
from surgeon.app.cli import main as surgeon
from surgeon.models import notation
from surgeon.proof import report
from surgeon.proof.schema import json_schema

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "cli.md"
SCHEMA = ROOT / "docs" / "schemas" / f"{report.SCHEMA}.schema.json"
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
        lines += [f"| `{', '.join((*p.opts, *p.secondary_opts))}` | {p.help}{_default(p)} |" for p in options]
        lines += ["", command.epilog, ""]
    lines += ["## Example inputs", "", notation.__doc__ or "", examples.__doc__ or ""]
    return "\n".join(lines).rstrip() + "\n"


def schema() -> str:
    """Write the JSON Schema of what `verify --json` prints."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield " ".join(paragraph.split())
        yield ""


def _default(option: Any) -> str:
    is_said = isinstance(option.default, int | float | str) and not isinstance(option.default, bool)
    return f" (default {option.default})" if is_said else ""


def with_outputs(readme: str) -> str:
    """Run the commands of the README's console blocks in one folder, in order, and write what they print below each.

    They run in this process, which saves importing torch anew for each of them.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _columns("150"):
        return _BLOCK.sub(lambda block: _run_block(block[1]), readme)


def _run_block(text: str) -> str:
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    lines = [line for command in commands for line in (f"$ {command}", *_output(command))]
    return "\n".join(["```console", *lines, "```"])


def _output(command: str) -> list[str]:
    """Run one command; return standard error and standard output, in the order of a terminal.

    Raises:
        RuntimeError: it fails.
    """
    program, *arguments = shlex.split(command)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), torch.random.fork_rng():
        torch.manual_seed(torch.Generator().initial_seed())  # the one that a new process begins with
        code = _run(program, arguments)
    if code:
        raise RuntimeError(f"`{command}` exits with {code}:\n{printed.getvalue()}")
    return [line.rstrip() for line in printed.getvalue().splitlines()]


def _run(program: str, arguments: list[str]) -> int | str | None:
    """Run what the README runs: `surgeon …` and `python -c …`; return its exit code."""
    try:
        if program == "surgeon":
            surgeon(arguments)
        elif program == "python" and arguments[0] == "-c":
            exec(compile(arguments[1], "README.md", "exec"), {"__name__": "__main__"})
        else:
            raise RuntimeError(f"the README runs {program}, which this script does not know")
    except SystemExit as stop:
        return stop.code
    return 0


@contextlib.contextmanager
def _columns(count: str) -> Iterator[None]:
    """Let tables be this wide."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = count
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def main() -> None:
    REFERENCE.write_text(reference(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    README.write_text(with_outputs(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
