"""What the command line puts on the screen: tables and JSON on standard output, notes and a bar on standard error.

Standard output belongs to the result of a command; whatever else prints while it runs, such as a package that brings
blocks, prints to standard error. Text of files and users is shown as it is: it is no markup, and steers no terminal.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from surgeon.display.shown import WIDE
from surgeon.errors import PassError, StoreError, SurgeonError, printable

if TYPE_CHECKING:
    from surgeon.models.progress import Progress

_log = logging.getLogger("surgeon")
_results: list[IO[str] | None] = []  # what standard output was before a command began


def _console(*, stderr: bool, file: IO[str] | None = None) -> Console:
    """Make a console as wide as the terminal; for a file or a pipe, wide enough for every table."""
    console = Console(stderr=stderr, file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


_err = _console(stderr=True)


class _Notes(logging.Handler):
    """Prints what is logged as notes and warnings, above the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        _err.print(f"{kind}: {printable(record.getMessage())}", soft_wrap=True)


@contextmanager
def notes() -> Iterator[None]:
    """Print what surgeon logs inside the block, and leave its logger as it was."""
    handler, level = _Notes(), _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


@contextmanager
def bar() -> Iterator[Progress]:
    """Draw a progress bar on a terminal; nothing is printed elsewhere."""
    doing = TextColumn("{task.description}", markup=False)  # names may hold brackets
    columns = (SpinnerColumn(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), doing)
    with bars.Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as drawn:
        task = drawn.add_task("starting", total=1.0)
        yield lambda what, share: drawn.update(task, description=printable(what), completed=share)


class NobodyReads(Exception):  # noqa: N818 - it is no error: `surgeon survey … | head`
    """Whoever reads standard output has gone."""


@contextmanager
def parsing() -> Iterator[None]:
    """Collect what typer prints by itself, such as help, and write it as results are written."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(io.StringIO()) as said:
            yield
        write(said.getvalue())
    finally:
        _results.pop()


def results_only() -> AbstractContextManager[Any]:
    """Keep standard output for what `show` and `write` put there; what others print goes to standard error."""
    return redirect_stdout(sys.stderr)


def show(result: RenderableType | dict[str, Any] | list[Any]) -> None:
    """Print the result of a command on stdout: a table, or a JSON document."""
    if isinstance(result, dict | list):
        write(_as_json(result) + "\n")
        return
    screen, like = io.StringIO(), _console(stderr=False, file=_stdout())
    console = Console(file=screen, width=like.width, force_terminal=like.is_terminal, legacy_windows=False)
    console.print(result, crop=False)
    write(screen.getvalue())


def show_file(text: str) -> None:
    """Print the text of a file: as it is into another file, and without what would steer a terminal on one."""
    out = _stdout()
    is_terminal = out is not None and out.isatty()
    write(printable(text.replace("\r\n", "\n"), keep="\n\t") if is_terminal else text)


def write(text: str) -> None:
    """Write to standard output; what its encoding does not have is escaped.

    Raises:
        StoreError: there is no room where it goes.
    """
    out = _stdout()
    if out is None:  # it is closed
        return
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        out.flush()
    except BrokenPipeError as error:
        _discard(out)
        raise NobodyReads from error
    except OSError as error:
        _discard(out)
        raise StoreError(
            f"cannot write to standard output: {error.strerror}", todo="Make room, or write it elsewhere."
        ) from error


def complain(said: object, *, because: BaseException | None = None) -> None:
    """Print an error on standard error, with the traceback of what it is about if that is given."""
    if because is not None:
        print(printable("".join(traceback.format_exception(because)), keep="\n"), end="", file=sys.stderr)
    text = printable(str(said), keep="\n")
    print(f"surgeon: {text}", file=sys.stderr)


def complain_of(error: Exception) -> int:
    """Print what surgeon did not expect, and give the exit code: a want of memory is no bug."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        complain("there is not enough memory for this. Give a smaller --input, or use a machine that has more.")
        return SurgeonError.exit_code
    complain(PassError("command line", repr(error)), because=error)
    return PassError.exit_code


def _discard(out: IO[str]) -> None:
    """Send what is still to be written to standard output nowhere, since nobody can take it."""
    if out is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _stdout() -> IO[str] | None:
    return _results[-1] if _results else sys.stdout


def _as_json(data: Any) -> str:
    """Write JSON exactly: what cannot be encoded as it is is escaped as JSON does."""
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(_stdout(), "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(_finite(data), indent=1, allow_nan=False)
    return text


def _finite(data: Any) -> Any:
    """Write Infinity and NaN as text, since JSON has no numbers for them."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
