"""Things that show themselves: as a table where they are printed, with its colours in a notebook."""

from __future__ import annotations

import io
import os
import shutil
import sys
from abc import ABC, abstractmethod

from rich.console import Console, RenderableType
from rich.measure import Measurement

WIDE = 180  # columns, enough for every table
_PRE = '<pre style="white-space: pre; overflow-x: auto; line-height: normal; font-family: monospace">{code}</pre>'


class Shown(ABC):
    """What `print` and notebooks show as a table, the same one that the command line prints."""

    __slots__ = ()

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Make the table."""

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def as_text(view: RenderableType) -> str:
    """Write a view without colours, as wide as the terminal, or `WIDE` columns if there is none."""
    is_terminal = "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty())
    console = _console(shutil.get_terminal_size().columns if is_terminal else WIDE)
    with console.capture() as captured:
        console.print(view, crop=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def as_html(view: RenderableType) -> str:
    """Write a view as one element of HTML with its colours, as wide as it needs to be, and at most `WIDE`."""
    console = _console(WIDE, record=True)
    wanted = Measurement.get(console, console.options, view).maximum
    console.print(view, width=max(wanted, 1), crop=False)
    return console.export_html(inline_styles=True, code_format=_PRE)


def _console(width: int, *, record: bool = False) -> Console:
    """Make a console that writes nothing to a terminal or to the cell of a notebook."""
    return Console(
        file=io.StringIO(),
        width=width,
        record=record,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
