"""Drawings of numbers, as SVG inside the page: points and bars on an axis, histograms, curves, heat maps.

Positions along the width are shares of it, and heights are pixels: a drawing becomes narrower on a telephone, and its
text does not become smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from surgeon.page.markup import element, joined

_MOST_TICKS = 8
_STRONG = 0.69  # of the colour of heat maps: from here on, text of the other colour is easier to read
_GAP = 16  # pixels between the bottom of a drawing and the numbers below it


@dataclass(frozen=True, slots=True)
class Axis:
    """Numbers from `least` to `most` along an axis; on a `log` axis these are powers of ten."""

    least: float
    most: float
    log: bool = False

    @classmethod
    def of_powers(cls, numbers: Iterable[float | None], *, fewest: int = 3) -> Axis:
        """Make an axis of whole powers of ten around numbers; zeros and numbers that are not finite lie at its ends.

        >>> Axis.of_powers([2e-7, 0.0, 3e-3])
        Axis(least=-8, most=-1, log=True)
        """
        powers = [math.log10(one) for one in numbers if one is not None and math.isfinite(one) and one > 0]
        least = math.floor(min(powers, default=-fewest)) - 1
        return cls(least, max(math.ceil(max(powers, default=0)) + 1, least + fewest), log=True)

    @classmethod
    def from_zero(cls, numbers: Iterable[float]) -> Axis:
        """Make an axis that begins at zero and ends beyond the largest number.

        >>> Axis.from_zero([0.3, 1.04])
        Axis(least=0.0, most=1.2, log=False)
        """
        most = max((one for one in numbers if math.isfinite(one)), default=0.0)
        step = _step(most or 1.0)
        return cls(0.0, round(math.ceil((most or 1.0) / step) * step, 12))

    def at(self, number: float) -> float:
        """Give the place of a number as a share of the axis; what lies beyond is put at its ends, NaN at the last.

        >>> Axis(-8, 0, log=True).at(1e-6), Axis(-8, 0, log=True).at(0.0), Axis(0, 2).at(math.inf)
        (0.25, 0.0, 1.0)
        """
        if math.isnan(number):
            return 1.0
        if self.log:
            number = math.log10(number) if number > 0 else -math.inf
        return min(1.0, max(0.0, (number - self.least) / (self.most - self.least)))

    def ticks(self) -> list[tuple[float, str]]:
        """List the places that are written beside the axis, and what is written there.

        >>> [said for _, said in Axis(0.0, 1.0).ticks()]
        ['0', '0.2', '0.4', '0.6', '0.8', '1']
        >>> Axis(-3, 0, log=True).ticks()
        [(0.0, '1e-3'), (0.3333333333333333, '0.01'), (0.6666666666666666, '0.1'), (1.0, '1')]
        """
        wide = self.most - self.least
        step = max(1.0, math.ceil(wide / _MOST_TICKS)) if self.log else _step(self.most)
        count = math.floor(wide / step + 1e-9) + 1
        numbers = [self.least + i * step for i in range(count)]
        return [((one - self.least) / wide, power(round(one)) if self.log else f"{one:.4g}") for one in numbers]


def _step(most: float) -> float:
    """Choose the distance of ticks so that there are four to eight of them."""
    unit = 10.0 ** math.floor(math.log10(most))
    return next(unit * part for part in (0.1, 0.2, 0.5, 1.0) if most / (unit * part) <= 8)


def power(exponent: int) -> str:
    """Write a power of ten.

    >>> power(-3), power(0)
    ('1e-3', '1')
    """
    return {-2: "0.01", -1: "0.1", 0: "1", 1: "10", 2: "100"}.get(exponent, f"1e{exponent}")


def percent(share: float) -> str:
    """Write a share of the width.

    >>> percent(0.3333333)
    '33.33%'
    """
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def drawing(title: str, says: str, height: float, *inside: object, sides: str = "") -> Markup:
    """Frame a drawing; `title` and `says` are what a screen reader reads.

    `sides` is "ch-left" where numbers stand on the left of it.
    """
    named = [element("title", title), element("desc", says)]
    return element("svg", named, *inside, class_=f"ch {sides}".strip(), role="img", height=f"{height:g}")


def across(axis: Axis, height: float, *, named: bool = True) -> Markup:
    """Draw an axis along the width: a line at every tick, and its number below; the last number ends where it is."""
    parts: list[Markup] = []
    ticks = axis.ticks()
    for i, (place, said) in enumerate(ticks):
        parts.append(element("line", class_="axis", x1=percent(place), x2=percent(place), y1=0, y2=height))
        if named:
            anchor = "end" if place > 0.97 else "start" if place < 0.03 else "middle"
            thin = " ch-thin" if i % 2 and len(ticks) > 5 else ""
            where = {"x": percent(place), "y": height + _GAP, "text_anchor": anchor}
            parts.append(element("text", said, class_=f"muted{thin}", **where))
    return joined(parts)


def upwards(axis: Axis, height: float, *, zero: bool = False) -> Markup:
    """Draw an axis along the height: a line at every tick, and its number on the left of it.

    `zero`: the lowest line of a log axis stands for numbers that are 0.
    """
    parts = []
    for place, said in axis.ticks():
        said = "0" if zero and place == 0 else said
        y = height * (1 - place)
        parts.append(element("line", class_="axis", x1=0, x2="100%", y1=y, y2=y))
        parts.append(element("text", said, class_="muted", x=-8, y=y + 4, text_anchor="end"))
    return joined(parts)


def dot(x: float, y: float, colour: str, said: str, *, mark: str = "circle", size: float = 5) -> Markup:
    """Draw a point with a text for those who point at it; `mark` is circle, ring, square or diamond."""
    title = element("title", said) if said else None
    if mark in ("circle", "ring"):
        style = {"class_": f"fill-{colour}"} if mark == "circle" else {"class_": f"ch-ring stroke-{colour}"}
        return element("circle", title, cx=percent(x), cy=y, r=size, **style)
    box = {"x": -size, "y": -size, "width": 2 * size, "height": 2 * size, "class_": f"fill-{colour}"}
    turned = "rotate(45)" if mark == "diamond" else None
    inner = element("rect", title, transform=turned, **box)
    return element("svg", inner, x=percent(x), y=y, class_="ch-open", width=1, height=1)


def bar(start: float, end: float, y: float, height: float, colour: str, said: str = "") -> Markup:
    """Draw a bar between two places."""
    start, end = sorted((start, end))
    title = element("title", said) if said else None
    where = {"x": percent(start), "y": y, "width": percent(end - start), "height": height}
    return element("rect", title, class_=f"fill-{colour}", **where)


def whisker(low: float, high: float, y: float, said: str) -> Markup:
    """Draw a range around the end of a bar: a line with a stop at both ends."""
    lines = [element("line", x1=percent(low), x2=percent(high), y1=y, y2=y)]
    lines += [element("line", x1=percent(at), x2=percent(at), y1=y - 4, y2=y + 4) for at in (low, high)]
    return element("g", element("title", said), *lines, class_="ch-whisker stroke-ink")


def columns(counts: Sequence[int], height: float, says: Sequence[str], colour: str = "after") -> Markup:
    """Draw a histogram: one column for each count, on a log scale, so that a single number can be seen."""
    top = math.log10(max([*counts, 1]) * 2)
    parts = []
    for i, (count, said) in enumerate(zip(counts, says, strict=True)):
        if count:
            tall = height * math.log10(count * 2) / top
            where = {"x": percent(i / len(counts)), "width": percent(0.92 / len(counts))}
            title = element("title", said)
            parts.append(element("rect", title, class_=f"fill-{colour}", y=height - tall, height=tall, **where))
    return joined(parts)


def curve(points: Sequence[tuple[float, float]], height: float, colour: str) -> Markup:
    """Draw a line through points, which are shares of the width and of the height from below."""
    places = " ".join(f"{100 * x:.2f},{100 * (1 - y):.2f}" for x, y in points)
    line = element("polyline", points=places, class_=f"ch-curve stroke-{colour}")
    return element("svg", line, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height=height)


def key(*entries: tuple[str, str, str]) -> Markup:
    """Explain marks: (mark, colour, words) of each; a mark is circle, ring, square, diamond, band or line."""
    return element("ul", [element("li", _sample(mark, colour), words) for mark, colour, words in entries], class_="key")


def _sample(mark: str, colour: str) -> Markup:
    if mark == "band":
        drawn = element("rect", x=0, y=2, width=14, height=10, class_=f"ch-noise fill-{colour}")
    elif mark == "line":
        drawn = element("line", x1=7, x2=7, y1=0, y2=14, class_="ch-limit stroke-ink")
    else:
        drawn = dot(0.5, 7, colour, "", mark=mark, size=5 if mark != "diamond" else 4)
    return element("svg", drawn, width=14, height=14, aria_hidden="true")


def heat_map(title: str, matrix: Sequence[Sequence[float]], *, cell: int = 44) -> Markup:
    """Draw a matrix of numbers from 0 to 1: the larger, the stronger its colour, and the number in every cell."""
    rows, wide = len(matrix), max(map(len, matrix), default=0)
    parts = []
    for y, row in enumerate(matrix):
        for x, number in enumerate(row):
            where = {"x": x * cell, "y": y * cell, "width": cell, "height": cell}
            parts.append(element("rect", class_="heat", fill_opacity=f"{min(1.0, max(0.0, number)):.2f}", **where))
            if cell >= 30:
                at = {"x": x * cell + cell / 2, "y": y * cell + cell / 2 + 4, "text_anchor": "middle"}
                on = "on-strong" if number >= _STRONG else "on-weak"
                parts.append(element("text", f"{number:.2f}", class_=on, **at))
    says = "; ".join(" ".join(f"{number:.2f}" for number in row) for row in matrix)
    named = [element("title", title), element("desc", f"Rows from the top: {says}")]
    size = {"width": wide * cell, "height": rows * cell, "viewBox": f"0 0 {wide * cell} {rows * cell}"}
    return element("svg", named, parts, class_="ch-heat", role="img", **size)
