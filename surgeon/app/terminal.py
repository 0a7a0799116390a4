"""What the command line puts on the screen: tables and JSON on standard output, notes and a bar on standard error."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from surgeon.display.shown import WIDE

if TYPE_CHECKING:
    from surgeon.models.progress import Progress

_log = logging.getLogger("surgeon")


def _console(*, stderr: bool) -> Console:
    """Make a console as wide as the terminal; for a file or a pipe, wide enough for every table."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return Console(stderr=stderr, highlight=False, width=WIDE)
    return console


_err = _console(stderr=True)


class _Notes(logging.Handler):
    """Prints what is logged as notes, above the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _err.print(f"note: {record.getMessage()}", markup=False, soft_wrap=True)


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
        yield lambda what, share: drawn.update(task, description=what, completed=share)


def show(result: RenderableType | dict[str, Any] | list[Any]) -> None:
    """Print the result of a command on stdout: a table, or a JSON document."""
    if isinstance(result, dict | list):
        print(json.dumps(_finite(result), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _console(stderr=False).print(result)


def _finite(data: Any) -> Any:
    """Write Infinity and NaN as text, since JSON has no numbers for them."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
