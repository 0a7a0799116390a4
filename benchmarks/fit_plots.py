"""Pictures for docs/fit.md: small panels of lines, written as SVG by hand; nothing else here needs a plotting library.

Across: the share of the multiply-adds that is left. Up: the share of test images that is classified wrongly, on a
logarithmic scale, so that a point near the original is as visible as twenty points near the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 300, 250  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 34, 40  # margins around its lines
TICKS = (0.02, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 0.9)
APART = 13  # pixels between two lines across
Points = Sequence[tuple[float, float]]  # share of the multiply-adds, share of errors


@dataclass(frozen=True, slots=True)
class Line:
    """A series: its points, its words in the legend, its colour, and how it is drawn."""

    words: str
    colour: str
    points: Points
    marker: str = "circle"  # or square, diamond, triangle: the colour alone shall not tell lines apart
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines with a title, and the errors of the original network."""

    title: str
    original: float
    lines: tuple[Line, ...]


def picture(panels: Sequence[Panel], columns: int, title: str) -> str:
    """Draw panels side by side, in rows, above one legend."""
    shown = [panel for panel in panels if any(line.points for line in panel.lines)]
    legend = list({line.words: line for panel in shown for line in panel.lines if line.points}.values())
    rows = -(-len(shown) // columns)
    width = WIDTH * min(columns, max(1, len(shown)))
    per_row = max(1, width // 215)
    height = HEIGHT * rows + 24 * -(-(len(legend) + 1) // per_row) + 10
    body = [line for at, panel in enumerate(shown) for line in _panel(panel, at % columns, at // columns)]
    body += _legend(legend, per_row, HEIGHT * rows + 14)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    style = 'role="img" font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#333">'
    about = [f"<title>{escape(title)}</title>", f'<rect width="{width}" height="{height}" fill="white"/>']
    return "\n".join([head + style, *about, *body, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where a panel stands, and what its axes reach."""

    left: float
    top: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, share: float) -> float:
        low, high = self.x
        return self.left + LEFT + (WIDTH - LEFT - RIGHT) * (share - low) / (high - low)

    def up(self, errors: float) -> float:
        low, high = (math.log(one) for one in self.y)
        return self.top + TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log(errors)) / (high - low)


def _panel(panel: Panel, column: int, row: int) -> Iterator[str]:
    points = [point for line in panel.lines for point in line.points]
    errors = [panel.original, *(up for _, up in points)]
    shares = [across for across, _ in points]
    x = (math.floor(min(shares) * 10 - 0.2) / 10, math.ceil(max(shares) * 10 + 0.2) / 10)
    axes = _Axes(column * WIDTH, row * HEIGHT, x, (min(errors) * 0.93, max(errors) * 1.07))
    place = f'x="{axes.left + LEFT}" y="{axes.top + 20}"'
    yield f'<text {place} font-size="13" font-weight="bold">{escape(panel.title)}</text>'
    yield from _grid(axes)
    level = axes.up(panel.original)
    ends = f'x1="{axes.across(x[0]):.1f}" x2="{axes.across(x[1]):.1f}" y1="{level:.1f}" y2="{level:.1f}"'
    yield f'<line {ends} stroke="#333" stroke-dasharray="2 3"/>'
    for line in panel.lines:
        if line.points:
            yield from _line(line, axes)


def _grid(axes: _Axes) -> Iterator[str]:
    left, right = axes.across(axes.x[0]), axes.across(axes.x[1])
    bottom, top = axes.up(axes.y[0]), axes.up(axes.y[1])
    if not axes.left:
        place = f'transform="translate({axes.left + 12:.1f} {(top + bottom) / 2:.1f}) rotate(-90)"'
        yield f'<text {place} text-anchor="middle">test images classified wrongly</text>'
    for tick in _ticks(axes):
        y = axes.up(tick)
        yield f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e3e3"/>'
        yield f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
    for tenth in range(round(axes.x[0] * 10), round(axes.x[1] * 10) + 1):
        x = axes.across(tenth / 10)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="#f0f0f0"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">×{tenth / 10:.1f}</text>'
    yield f'<text x="{(left + right) / 2:.1f}" y="{bottom + 30:.1f}" text-anchor="middle">multiply-adds left</text>'
    size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
    yield f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="none" stroke="#999"/>'


def _ticks(axes: _Axes) -> list[float]:
    """Choose the errors that get a line: those that are not too near to the one below."""
    shown: list[float] = []
    for tick in (one for one in TICKS if axes.y[0] <= one <= axes.y[1]):
        if not shown or axes.up(shown[-1]) - axes.up(tick) >= APART:
            shown.append(tick)
    return shown


def _line(line: Line, axes: _Axes) -> Iterator[str]:
    places = [(axes.across(x), axes.up(y)) for x, y in sorted(line.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
    yield f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.8"{dashes}/>'
    for x, y in places:
        yield _marker(line, x, y)


def _marker(line: Line, x: float, y: float) -> str:
    fill = "white" if line.dashed else line.colour
    look = f'fill="{fill}" stroke="{line.colour}" stroke-width="1.5"'
    if line.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" {look}/>'
    corners = {
        "square": ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
        "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        "triangle": ((0, -4.6), (4.4, 3.4), (-4.4, 3.4)),
    }[line.marker]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}" {look}/>'


def _legend(lines: Sequence[Line], per_row: int, top: float) -> Iterator[str]:
    for at, line in enumerate((*lines, None)):
        x, y = LEFT + 215 * (at % per_row), top + 24 * (at // per_row)
        if line is None:
            yield f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke="#333" stroke-dasharray="2 3"/>'
        else:
            dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
            yield f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke="{line.colour}" stroke-width="1.8"{dashes}/>'
            yield _marker(line, x + 13, y)
        words = "the original" if line is None else line.words
        yield f'<text x="{x + 32}" y="{y + 4}">{escape(words)}</text>'
