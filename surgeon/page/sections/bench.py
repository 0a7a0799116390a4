"""How long the models take, beside what they cost on paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from markupsafe import Markup

from surgeon.display import words
from surgeon.page import charts
from surgeon.page.base import Section
from surgeon.page.charts import Axis
from surgeon.page.data import PageData
from surgeon.page.markup import element, filled, joined
from surgeon.surgery.bench import Timing

_ROW = 58  # pixels of one model: its name, two bars, and a gap


class Bench(Section):
    """For every setting: the measured time of each model beside its multiply-adds, both against the first model."""

    title = "Time"
    anchor = "time"
    place = 60

    def applies(self, data: PageData) -> bool:
        return bool(data.timings)

    def body(self, data: PageData) -> Markup:
        groups = [
            (_name(setting, device), list(_rows(list(group))))
            for (setting, device), group in groupby(data.timings, key=lambda one: (str(one.setting), one.device))
        ]
        return filled(
            "bench.html",
            groups=groups,
            key=charts.key(("square", "before", "multiply-adds"), ("square", "after", "measured time")),
            doubtful=list(dict.fromkeys(one.model for one in data.timings if not one.is_believable)),
        )


def _name(setting: str, device: str) -> str:
    return setting if device == "cpu" else f"{setting}, {device}"


def _rows(timings: Sequence[Timing]) -> Iterator[tuple[str, Markup, list[tuple[str, ...]]]]:
    """Give one drawing and one table for each form, as models are compared within their form."""
    for form, group in groupby(timings, key=lambda one: one.form):
        alike = list(group)
        yield form, _drawing(form, alike), [_cells(one) for one in alike]


def _drawing(form: str, timings: Sequence[Timing]) -> Markup:
    ratios = [value for one in timings for value in (one.macs_ratio or 0.0, one.time_ratio, one.quartiles[1])]
    axis = Axis.from_zero(ratios)
    height = _ROW * len(timings)
    parts = [charts.across(axis, height), *(_pair(one, _ROW * i, axis) for i, one in enumerate(timings))]
    one = charts.percent(axis.at(1.0))
    parts.append(element("line", class_="rule", x1=one, x2=one, y1=0, y2=height))
    says = "; ".join(f"{one.model}: {_said(one)}" for one in timings)
    return charts.drawing(f"Time and multiply-adds, {form}", says, height + 22, *parts)


def _pair(one: Timing, top: float, axis: Axis) -> Markup:
    """Draw both bars of one model below its name."""
    low, high = one.quartiles
    parts = [element("text", one.model, class_="path", x=0, y=top + 14)]
    if one.macs_ratio is not None:
        said = f"{one.model}: × {one.macs_ratio:.3f} multiply-adds"
        parts.append(charts.bar(0, axis.at(one.macs_ratio), top + 20, 10, "before", said))
    said = f"{one.model}: {_said(one)}"
    parts.append(charts.bar(0, axis.at(one.time_ratio), top + 32, 10, "after", said))
    said = f"half of the rounds lie between {low:.3f} and {high:.3f}"
    parts.append(charts.whisker(axis.at(low), axis.at(high), top + 37, said))
    return joined(parts)


def _said(one: Timing) -> str:
    macs = "" if one.macs_ratio is None else f", × {one.macs_ratio:.3f} multiply-adds"
    return f"× {one.time_ratio:.3f} of the time of the first model ({one.seconds * 1e3:.3g} ms){macs}"


def _cells(one: Timing) -> tuple[str, ...]:
    low, high = one.quartiles
    return (
        one.model,
        f"{one.seconds * 1e3:.3g}",
        f"{one.spread * 100:.0f}",
        f"{one.per_second:.3g}",
        words.amount(one.macs),
        "—" if one.macs_ratio is None else f"{one.macs_ratio:.3f}",
        f"{one.time_ratio:.3f}" + ("" if one.is_believable else " ?"),
        f"{low:.3f} … {high:.3f}",
        words.amount(one.peak_bytes, "B"),
    )
