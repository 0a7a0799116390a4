"""The picture of a choice under a budget: multiply-adds against error, as an SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from surgeon.errors import printable

if TYPE_CHECKING:
    from surgeon.fitting.budget import Chosen, Point

_WIDTH, _HEIGHT = 760, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 72, 56
_MARKS = {  # of each kind of point: its colour, its radius, and what it is
    "alone": ("#b8bfc8", 3.0, "one site alone, in one setting"),
    "uniform": ("#d1852b", 5.0, "one setting for all sites that save most, measured"),
    "measured": ("#3b78b5", 5.0, "other choices, measured"),
    "chosen": ("#b5303b", 6.5, "the plan, measured"),
}
_DASHED = "stroke='#3b78b5' stroke-width='1.5' stroke-dasharray='5 3'"


def svg(chosen: Chosen) -> str:
    """Draw all networks on the way to a plan: predicted as a line, measured as dots."""
    frame = _Frame(chosen.points)
    line = [point for point in chosen.points if point.kind == "predicted"]
    parts = [*frame.axes(), *frame.line(line)]
    for kind in _MARKS:
        parts += [frame.dot(point) for point in chosen.points if point.kind == kind]
    parts += _legend([kind for kind in _MARKS if any(point.kind == kind for point in chosen.points)], bool(line))
    style = "font-family='system-ui, sans-serif' font-size='12'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' {style}>"
    title = "<title>Multiply-adds against the error of the outputs</title>"
    return "\n".join([head, title, f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>", *parts, "</svg>", ""])


class _Frame:
    """Where numbers lie on the page."""

    def __init__(self, points: Sequence[Point]) -> None:
        shares, errors = [point.macs for point in points], [point.error for point in points]
        self.least = math.floor(10 * min(shares, default=0.5)) / 10
        self.most = 1.0
        self.highest = _round_up(max((error for error in errors if math.isfinite(error)), default=1.0))

    def x(self, share: float) -> float:
        return _LEFT + (share - self.least) / (self.most - self.least or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, error: float) -> float:
        return _HEIGHT - _BOTTOM - min(1.0, error / self.highest) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> Iterator[str]:
        """Draw the grid, with numbers beside it and what they are."""
        for i in range(round(10 * (self.most - self.least)) + 1):
            share = self.least + i / 10
            x, bottom = self.x(share), _HEIGHT - _BOTTOM
            yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{bottom}' stroke='#e6e9ed'/>"
            yield f"<text x='{x:.1f}' y='{bottom + 18}' text-anchor='middle' fill='#555'>×{share:.1f}</text>"
        for i in range(6):
            error = self.highest * i / 5
            y = self.y(error)
            yield f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e6e9ed'/>"
            yield f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end' fill='#555'>{error:.3g}</text>"
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        place = f"x='{middle}' y='{_HEIGHT - 14}' text-anchor='middle'"
        yield f"<text {place}>multiply-adds of the network, as deployed</text>"
        turned = f"transform='rotate(-90 18 {_HEIGHT / 2})' x='18' y='{_HEIGHT / 2}' text-anchor='middle'"
        yield f"<text {turned}>relative error of the outputs</text>"

    def line(self, points: Sequence[Point]) -> Iterator[str]:
        """Draw what is predicted for the best choice at every cost."""
        if points:
            places = " ".join(f"{self.x(one.macs):.1f},{self.y(one.error):.1f}" for one in points)
            yield f"<polyline points='{places}' fill='none' {_DASHED}/>"

    def dot(self, point: Point) -> str:
        colour, radius, what = _MARKS[point.kind]
        words = escape(printable(point.words or what), quote=True)
        said = f"<title>{words}: ×{point.macs:.3f}, error {point.error:.3g}</title>"
        place = f"cx='{self.x(point.macs):.1f}' cy='{self.y(point.error):.1f}' r='{radius}'"
        return f"<circle {place} fill='{colour}' fill-opacity='0.9'>{said}</circle>"


def _legend(kinds: Sequence[str], has_line: bool) -> Iterator[str]:
    """Say above the picture what the marks are, in two rows."""
    entries = [(kind, *_MARKS[kind]) for kind in kinds]
    for i, (_, colour, radius, what) in enumerate(entries):
        x, y = _LEFT + 8 + 340 * (i % 2), 20 + 20 * (i // 2)
        yield f"<circle cx='{x}' cy='{y}' r='{radius}' fill='{colour}'/><text x='{x + 14}' y='{y + 4}'>{what}</text>"
    if has_line:
        i = len(entries)
        x, y = _LEFT + 340 * (i % 2), 20 + 20 * (i // 2)
        yield f"<line x1='{x}' x2='{x + 18}' y1='{y}' y2='{y}' {_DASHED}/>"
        yield f"<text x='{x + 24}' y='{y + 4}'>the best choice at every cost, foreseen</text>"


def _round_up(number: float) -> float:
    """Give the next of 1, 2, 2.5, 5, 10 times a power of ten.

    >>> _round_up(0.31), _round_up(0.0)
    (0.5, 1.0)
    """
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= number * 0.999999)
