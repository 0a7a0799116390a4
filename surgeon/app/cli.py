"""The command line: parse, call one function of `commands`, print, exit code. torch is imported only when needed."""

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from surgeon.app import on_path, on_pairs, on_models, on_kernels, on_pages, shelf  # isort: skip  (in this order)
from surgeon.app.program import app
from surgeon.app.stopping import Stopped, stoppable
from surgeon.app.terminal import NobodyReads, complain, complain_of, notes, parsing
from surgeon.errors import PassError, SurgeonError, printable

__all__ = ["app", "main", "on_kernels", "on_models", "on_pages", "on_pairs", "on_path", "shelf"]

_UsageError: Any = typer.BadParameter.__base__  # what typer raises for arguments that it does not understand


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that surgeon raises becomes one message and an exit code."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, and nothing here needs NumPy
    try:
        with stoppable(), notes():
            code = _run(arguments)
    except SurgeonError as error:
        complain(error, because=error if isinstance(error, PassError) else None)
        code = error.exit_code
    except Stopped as stopped:
        complain(f"stopped by {stopped}; no file is left half-written")
        code = stopped.exit_code
    except NobodyReads:
        code = 141
    except Exception as error:
        code = complain_of(error)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run a command; its exit code."""
    with parsing():
        try:
            code = app(arguments, standalone_mode=False)
        except _UsageError as error:
            usage = io.StringIO()
            error.show(usage)
            print(printable(usage.getvalue(), keep="\n"), end="", file=sys.stderr)
            code = error.exit_code
    return int(code or 0)
