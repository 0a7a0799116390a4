"""A table that breaks no name and cuts nothing off, however narrow the terminal is.

Where there is room, a row is a line; a remark at its end that does not fit stands below it. On narrower terminals
columns of text, such as the geometry of a conv, stand below each row as well, and then other columns from the right,
until the first one, a name, is alone on its line. A column in which no row has anything is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from surgeon.errors import printable

_GAP = "  "
_NARROW = 30  # columns below which prose is not broken where it stands
_LISTED = 100  # columns that a list of names takes at most in a page that scrolls


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `below` is what its cells begin with where they stand below their row."""

    title: str
    below: str
    is_number: bool = False
    is_text: bool = False  # goes below the row first
    is_prose: bool = False  # text that may also take several lines where it stands


@dataclass(slots=True)
class _Row:
    cells: list[Text]
    style: str


@dataclass(slots=True)
class Sheet:
    """A table whose rows are lines; text of users is no markup in it."""

    columns: Sequence[Column]
    caption: str = ""
    _rows: list[_Row] = field(default_factory=list)
    _widths: dict[int, int] = field(default_factory=dict)

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        row = _Row([cell(one) if isinstance(one, str) else one for one in cells], style)
        self._rows.append(row)
        for i, one in enumerate(row.cells):
            self._widths[i] = max(self._widths.get(i, cell_len(self.columns[i].title)), one.cell_len)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        beside, below, last = self._arranged(options.max_width)
        room = options.max_width - self._width(beside) - len(_GAP)
        wraps = [i for i in last if self.columns[i].is_prose and room >= _NARROW]
        named = wraps or [i for i in last if any(0 < row.cells[i].cell_len <= room for row in self._rows)]
        title = [cell(self.columns[i].title) for i in named if cell_len(self.columns[i].title) <= room]
        if len(beside) > 1 or title:
            yield _line(self._aligned([cell(column.title) for column in self.columns], beside, title), "bold")
        for row in self._rows:
            yield from self._row(row, beside, below, last, options.max_width)
        if self.caption:
            yield from hanging(self.caption.split(" "), options.max_width, "dim", joint="", first=0)

    def _row(self, row: _Row, beside: list[int], below: list[int], last: list[int], width: int) -> Iterator[Text]:
        start = self._width(beside) + len(_GAP)
        fits = [row.cells[i] for i in last if row.cells[i].cell_len <= width - start]
        rest: list[Text] = []
        if not fits and last and self.columns[last[0]].is_prose and width - start >= _NARROW:
            words = row.cells[last[0]].plain.split(" ")
            head, *rest = hanging(words, width, row.style, joint="", first=start, indent=start)
            fits = [head[start:]]
        yield _line(self._aligned(row.cells, beside, fits), row.style)
        yield from rest
        under = [i for i in (*below, *(() if fits else last)) if row.cells[i].plain]
        yield from hanging([self.columns[i].below + row.cells[i].plain for i in under], width, row.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(self._width(self._used()), cell_len(self.caption)))

    def _used(self) -> list[int]:
        """Give the columns in which a row has something."""
        return [i for i in range(len(self.columns)) if i == 0 or any(row.cells[i].plain for row in self._rows)]

    def _width(self, columns: Sequence[int]) -> int:
        return sum(self._widths.get(i, 0) for i in columns) + len(_GAP) * (len(columns) - 1)

    def _arranged(self, width: int) -> tuple[list[int], list[int], list[int]]:
        """Say which columns stand beside each other, which below, and which is last and stands where it fits."""
        beside, below = self._used(), list[int]()
        last = [beside.pop()] if len(beside) > 1 and self.columns[beside[-1]].is_text else []
        movable = sorted(beside[1:], key=lambda i: (not self.columns[i].is_text, -i))  # texts first, from the right
        for i in movable:
            if self._width(beside) <= width:
                break
            beside.remove(i)
            below.append(i)
        return beside, sorted(below), last

    def _aligned(self, cells: Sequence[Text], columns: Sequence[int], last: Sequence[Text]) -> Text:
        line = Text()
        for i in columns:
            space = Text(" " * (self._width([i]) - cells[i].cell_len))
            line = line + Text(_GAP if i != columns[0] else "")
            line = line + space + cells[i] if self.columns[i].is_number else line + cells[i] + space
        for one in last:
            line = line + Text(_GAP) + one
        line.rstrip()
        return line


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence, behind a mark if it has one; where it takes several lines, the others are indented."""

    says: str
    style: str = ""
    mark: str = ""
    mark_style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide, indent = len(self.mark), len(self.mark) or len(_GAP)
        lines = list(hanging(self.says.split(" "), options.max_width, self.style, joint="", first=wide, indent=indent))
        if lines and self.mark:
            lines[0] = _line(Text(self.mark, self.mark_style) + lines[0][wide:], "")
        yield from lines or [Text()]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, len(self.mark) + cell_len(self.says))


@dataclass(frozen=True, slots=True)
class Listing:
    """A sentence, and below it names that are not broken; or only the first of them, and how many more there are."""

    says: str
    names: Sequence[str]
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Line(self.says)
        shown = list(self.names[: self.most])
        more = [f"{len(self.names) - len(shown)} more"] * (len(shown) < len(self.names))
        yield from hanging([*shown, *more], options.max_width, joint=",")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(cell_len(self.says), min(_LISTED, cell_len(", ".join(self.names)) + len(_GAP))))


def cell(said: str, style: str = "") -> Text:
    """Make a cell of a text, in which nothing is markup and nothing steers a terminal."""
    return Text(printable(said), style)


def hanging(
    pieces: Sequence[str],
    width: int,
    style: str = "",
    *,
    joint: str = ";",
    indent: int = len(_GAP),
    first: int | None = None,
) -> Iterator[Text]:
    """Write pieces of text one after the other on indented lines; one is broken at a space if no line can hold it."""
    lines = [" " * (indent if first is None else first)]
    is_fresh = True
    for word in _words([printable(piece) for piece in pieces], width - indent, joint):
        if not is_fresh and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines.append(" " * indent)
            is_fresh = True
        lines[-1] += word if is_fresh else f" {word}"
        is_fresh = False
    yield from (_line(Text(line), style) for line in lines if line.strip())


def _words(pieces: Sequence[str], width: int, joint: str) -> Iterator[str]:
    for i, piece in enumerate(pieces, start=1):
        whole = piece + joint * (i < len(pieces))
        yield from [whole] if cell_len(whole) <= width else whole.split(" ")


def _line(line: Text, style: str) -> Text:
    """Let a text be one line, which nothing breaks or cuts."""
    line = line.copy()
    if style:
        line.stylize(style)
    line.no_wrap, line.overflow = True, "ignore"
    return line
