"""Pairs of bars, before and after: drawn in per cent of the width, so that they are as wide as there is room."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from surgeon.display import words
from surgeon.page.markup import element
from surgeon.page.rows import Cost

_ROW, _BAR = 34, 9  # heights of a pair with its name, and of one bar


def pair(cost: Cost, most: int) -> Markup:
    """Draw two bars as a mark beside numbers that say the same; screen readers pass it by."""
    bars = [_bar(cost.before, most, 1, "fill-before"), _bar(cost.after, most, 8, "fill-after")]
    if cost.before == cost.after:
        bars = [_bar(cost.before, most, 4, "fill-before", 7)]
    return element("svg", *bars, class_="pair", width="100%", height=15, aria_hidden="true", focusable="false")


def _bar(value: int, most: int, y: float, colour: str, height: int = 6) -> Markup:
    width = 100 * value / most if most else 0.0
    return element("rect", x=0, y=y, width=f"{max(width, 0.4 if value else 0):.2f}%", height=height, class_=colour)


def chart(title: str, about: str, entries: Sequence[tuple[str, Cost]], unit: str = "") -> Markup:
    """Draw a pair of bars for each entry, with its name and numbers above them, longest bar at full width."""
    most = max((max(cost.before, cost.after) for _, cost in entries), default=0)
    drawn = [part for i, (name, cost) in enumerate(entries) for part in _entry(i, name, cost, most, unit)]
    head = [element("title", title), element("desc", about)]
    return element("svg", *head, *drawn, role="img", class_="bars", width="100%", height=_ROW * len(entries) + 2)


def _entry(i: int, name: str, cost: Cost, most: int, unit: str) -> list[Markup]:
    y = _ROW * i
    said = words.amount(cost.before, unit)
    if cost.after != cost.before:
        said += f" → {words.amount(cost.after, unit)}" + (f" (×{cost.ratio:.2f})" if cost.ratio is not None else "")
    if cost.after != cost.before:
        bars = [_bar(cost.before, most, y + 17, "fill-before", 6), _bar(cost.after, most, y + 23, "fill-after", 6)]
    else:
        bars = [_bar(cost.before, most, y + 17, "fill-before", _BAR)]
    return [
        element("text", name, x=0, y=y + 13, class_="path"),
        element("text", said, x="100%", y=y + 13, text_anchor="end", class_="muted"),
        *bars,
    ]
