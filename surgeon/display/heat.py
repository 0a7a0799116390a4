"""Matrices of numbers between 0 and 1 as heat maps in a terminal, as many beside each other as there is room for.

Every cell has its number, so that nothing is lost where there are no colours. A matrix too wide for that has shorter
numbers, and one too wide for those has one shade of grey for each cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.text import Text

from surgeon.display.sheet import cell

# From nothing to the largest entry; between them colours are mixed. A printed page and a dark screen bear all of them.
RAMP = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_GAP = 2
_SHADES = " ░▒▓█"
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One matrix, and what stands above it."""

    heading: str
    rows: Rows


@dataclass(frozen=True, slots=True)
class Panels:
    """Heat maps side by side; those for which there is no room stand below."""

    panels: Sequence[Panel]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, line in enumerate(self._arranged(options.max_width)):
            if number:
                yield cell("")
            yield from _beside(line, options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [_width(panel, options.max_width) for panel in self.panels]
        return Measurement(min(max(widths, default=1), options.max_width), sum(widths) + _GAP * (len(widths) - 1))

    def _arranged(self, width: int) -> Iterator[list[Panel]]:
        """Put panels on lines, as many as fit on each."""
        line: list[Panel] = []
        used = 0
        for panel in self.panels:
            wanted = _width(panel, width)
            if line and used + _GAP + wanted > width:
                yield line
                line, used = [], 0
            used += wanted + (_GAP if line else 0)
            line.append(panel)
        if line:
            yield line


def number(value: float) -> str:
    """Write an entry as the paper does.

    >>> number(0.8264), number(1.0)
    ('.826', '1.000')
    """
    return f"{value:.3f}".removeprefix("0")


def colour(value: float) -> tuple[int, int, int]:
    """Mix the colour of an entry.

    >>> colour(0.0) == RAMP[0], colour(1.0) == RAMP[-1]
    (True, True)
    """
    place = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    share = place - first
    mixed = (round(a + share * (b - a)) for a, b in zip(RAMP[first], RAMP[first + 1], strict=True))
    red, green, blue = mixed
    return red, green, blue


def is_dark(value: float) -> bool:
    """Whether white letters on the colour of an entry have more contrast than black ones, as WCAG 2 measures it."""
    linear = [(one / 255 / 12.92 if one <= 10 else ((one / 255 + 0.055) / 1.055) ** 2.4) for one in colour(value)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def _width(panel: Panel, most: int) -> int:
    columns = max(map(len, panel.rows), default=0)
    return min(max(_cell_width(columns, most) * columns, cell_len(panel.heading)), most)


def _cell_width(columns: int, most: int) -> int:
    """How wide a cell is: with three digits, two, or none."""
    return next((wide for wide in (6, 4, 2) if wide * columns <= most), 1)


def _beside(panels: Sequence[Panel], width: int) -> Iterator[Text]:
    """Write the headings of panels, and below them their rows."""
    wide = [_width(panel, width) for panel in panels]
    headings = [_cut(panel.heading, one) for panel, one in zip(panels, wide, strict=True)]
    yield _joined([cell(heading, "bold") for heading in headings], wide)
    for i in range(max(len(panel.rows) for panel in panels)):
        yield _joined([_row(panel.rows, i, width) for panel in panels], wide)


def _row(rows: Rows, i: int, width: int) -> Text:
    text = cell("")
    if i < len(rows):
        wide = _cell_width(len(rows[i]), width)
        for value in rows[i]:
            text.append(_entry(value, wide), _style(value))
    return text


def _entry(value: float, wide: int) -> str:
    if wide == 6:
        return f"{number(value):>5} "
    if wide == 4:
        return f"{f'{value:.2f}'.removeprefix('0')[:3]:>3} "
    return _SHADES[min(round(value * (len(_SHADES) - 1)), len(_SHADES) - 1)] * wide


def _style(value: float) -> Style:
    ink = (255, 255, 255) if is_dark(value) else (0, 0, 0)
    return Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*colour(value)))


def _joined(texts: Sequence[Text], wide: Sequence[int]) -> Text:
    line = cell("")
    line.no_wrap, line.overflow = True, "ignore"
    for i, (text, columns) in enumerate(zip(texts, wide, strict=True)):
        is_last = i == len(texts) - 1
        line.append_text(text)
        line.append("" if is_last else " " * (columns - text.cell_len + _GAP))
    return line


def _cut(heading: str, width: int) -> str:
    """Shorten a heading in its middle, since names differ at their ends."""
    if cell_len(heading) <= width:
        return heading
    kept = max(width - 1, 2)
    return f"{heading[: kept // 2]}…{heading[-(kept - kept // 2) :]}"
