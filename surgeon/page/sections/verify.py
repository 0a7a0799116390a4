"""Whether B computes what A computes: what was found, how much is allowed, and where the two diverge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from surgeon.page import charts
from surgeon.page.base import Section
from surgeon.page.charts import Axis
from surgeon.page.data import PageData
from surgeon.page.markup import element, filled, joined
from surgeon.proof.agreement import Agreement
from surgeon.proof.report import Asks, Check, Distance, Histogram, Report, SiteDistance, TensorDistance

_QUESTIONS: dict[Asks, str] = {
    "mathematics": "Is the mathematics right?",
    "storage": "Is what is stored that result?",
    "arithmetic": "Does its arithmetic behave?",
}
_VERDICTS = {
    "equivalent": ("good", "Equivalent: B computes what A computes."),
    "different": ("bad", "Different: B does not compute what A computes."),
    "approximate": ("warn", "Approximate by design: these distances do not prove that B equals A."),
}
_UNITS = {"ulp": "units in the last place", "times": "times what rounding the weights explains"}
_KINDS = {"output": ("square", "before"), "statistic": ("ring", "low"), "gradient": ("circle", "after")}
_TALL = 200  # pixels of the drawing of all sites


class Verify(Section):
    """The three questions with what was found and what is allowed, and where the two models diverge."""

    title = "Verify"
    anchor = "verify"
    place = 50

    def applies(self, data: PageData) -> bool:
        return data.report is not None

    def body(self, data: PageData) -> Markup:
        report = data.report
        assert report is not None
        names = [one.name for one in data.models]
        style, verdict = _VERDICTS[report.verdict]
        return filled(
            "verify.html",
            report=report,
            names=names if len(names) == 2 else [],
            style=style,
            verdict=verdict,
            questions=[(title, list(_checks(report, asks))) for asks, title in _QUESTIONS.items()],
            failed=sum(not check.passed for check in report.checks),
            key=_key(report.checks),
            distances=[(one, _distance_row(one, report.dtype)) for one in report.distances],
            histograms=list(_histograms(report)),
            number=number,
            tensors=_tensors(report.tensors),
            tensors_key=_tensors_key(report.tensors),
            agreement=[] if report.data is None else list(_agreement(report.data)),
            sites=_sites(report.sites),
            sites_key=_sites_key(report.sites),
            rows=[_site_row(one) for one in report.sites],
        )


def number(value: float | None) -> str:
    """Write a distance."""
    if value is None:
        return "—"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "0" if value == 0 else f"{value:.1e}" if not 0.01 <= abs(value) < 1e4 else f"{value:.3g}"


def _checks(report: Report, asks: Asks) -> Iterator[tuple[Check, Markup | None]]:
    """Give the checks of one question, each with its drawing; all of one unit lie on one axis."""
    for check in report.checks:
        if check.asks == asks:
            alike = [one for one in report.checks if one.unit == check.unit]
            yield check, None if check.unit == "count" else _bullet(check, _axis_of(alike))


def _axis_of(checks: Sequence[Check]) -> Axis:
    numbers = [value for one in checks for value in (one.measured, one.limit, one.noise)]
    return Axis.of_powers(numbers)


def _bullet(check: Check, axis: Axis) -> Markup:
    """Draw what was found on a line, with the limit across it and the noise as a band."""
    height, middle = 26, 13
    found, limit, noise = axis.at(check.measured), axis.at(check.limit), check.noise
    parts = [charts.across(axis, height)]
    if noise:
        said = f"rounding alone: {number(noise)}"
        band = {"x": 0, "y": middle - 6, "width": charts.percent(axis.at(noise)), "height": 12}
        parts.append(element("rect", element("title", said), class_="ch-noise fill-sunk", **band))
    parts.append(element("line", class_="axis", x1=0, x2="100%", y1=middle, y2=middle))
    if math.isfinite(check.limit):
        at = {"x1": charts.percent(limit), "x2": charts.percent(limit), "y1": 1, "y2": height - 1}
        parts.append(
            element("line", element("title", f"limit: {number(check.limit)}"), class_="ch-limit stroke-ink", **at)
        )
    mark, colour = ("circle", "good") if check.passed else ("diamond", "bad")
    if check.passed and check.measured == 0:
        mark = "ring"
    parts.append(charts.dot(found, middle, colour, f"found: {number(check.measured)}", mark=mark))
    unit = _UNITS.get(check.unit, check.unit)
    says = f"Found {number(check.measured)}, limit {number(check.limit)}, {unit}, on a log scale."
    says += f" Rounding alone does {number(noise)}." if noise else ""
    return charts.drawing(f"{check.name}: {'passes' if check.passed else 'fails'}", says, height + 22, *parts)


def _key(checks: Sequence[Check]) -> Markup:
    entries = [("circle", "good", "found, within its limit")]
    entries += [("ring", "good", "found to be zero")] * any(one.passed and one.measured == 0 for one in checks)
    entries += [("diamond", "bad", "found, beyond its limit")] * any(not one.passed for one in checks)
    entries += [("line", "ink", "limit"), ("band", "sunk", "what rounding alone does")]
    return charts.key(*entries)


def _distance_row(one: Distance, dtype: str) -> list[tuple[str, str]]:
    rows = [("relative L2 in float64", number(one.float64)), (f"relative L2 in {dtype}", number(one.own))]
    rows += [("largest difference", number(one.max_abs)), ("largest relative difference", number(one.max_rel))]
    decibels = f"{one.sqnr_db:.1f} dB" if math.isfinite(one.sqnr_db) else "exact" if one.own == 0 else "—"
    rows += [("signal to noise", decibels), ("cosine", f"{one.cosine:.9f}" if math.isfinite(one.cosine) else "—")]
    return rows + ([("same top-1", f"{one.top1:.1%}")] if one.top1 is not None else [])


def _agreement(found: Agreement) -> Iterator[tuple[str, str]]:
    """Write what both models make of images."""
    yield found.of, str(found.items)
    yield "same class", f"{found.agreement:.2%}"
    if found.top5_agreement is not None:
        yield "A’s class among B’s five", f"{found.top5_agreement:.2%}"
    if found.kl_mean is not None:
        yield "KL(A‖B), mean", number(found.kl_mean)
        yield "KL(A‖B), largest", number(found.kl_max)
    if (labelled := found.labelled) is not None:
        yield "accuracy of A", f"{labelled.accuracy_a:.2%}"
        yield "accuracy of B", f"{labelled.accuracy_b:.2%}"
        yield "right in A alone, in B alone", f"{labelled.lost}, {labelled.won}"
        yield "p (exact McNemar)", f"{labelled.p:.2g}"


def _histograms(report: Report) -> Iterator[tuple[str, Histogram, Markup | None, list[tuple[str, int]]]]:
    """Draw the differences of every input on the same axis."""
    known = [(one.input, one.histogram) for one in report.distances if one.histogram is not None]
    filled_ = [one for _, one in known if one.counts]
    if not known:
        return
    least = math.floor(min((one.lowest for one in filled_), default=-3.0))
    most = math.ceil(max((one.lowest + one.width * len(one.counts) for one in filled_), default=0.0))
    axis = Axis(least, max(most, least + 3), log=True)
    for label, one in known:
        bins = list(_bins(one))
        yield label, one, _histogram(label, one, axis) if bins else None, bins


def _bins(one: Histogram) -> Iterator[tuple[str, int]]:
    for i, count in enumerate(one.counts):
        if count:
            low, high = (10 ** (one.lowest + one.width * (i + step)) for step in (0, 1))
            yield f"{low:.1e} … {high:.1e}", count


def _histogram(label: str, one: Histogram, axis: Axis) -> Markup:
    height = 110
    ahead = round((one.lowest - axis.least) / one.width)
    total = round((axis.most - axis.least) / one.width)
    counts = ([0] * ahead + list(one.counts) + [0] * total)[:total]
    says = []
    for i, count in enumerate(counts):
        low, high = (10 ** (axis.least + one.width * (i + step)) for step in (0, 1))
        says.append(f"{low:.1e} … {high:.1e}: {count}")
    drawn = [charts.across(axis, height), charts.columns(counts, height, says)]
    title = f"Differences of the outputs for {label}"
    said = f"{sum(one.counts)} numbers differ, {one.equal} are equal; counts by size of the difference, both log."
    return charts.drawing(title, said, height + 22, *drawn)


def _sites(sites: Sequence[SiteDistance]) -> Markup | None:
    """Draw the distance of every site in order of execution: its own, and with what came before it."""
    numbers = [value for one in sites for value in (one.isolated, one.propagated)]
    if not any(numbers):  # nothing is known, or nothing differs: there are no powers of ten to draw
        return None
    axis = Axis.of_powers(numbers)
    parts = [charts.upwards(axis, _TALL, zero=True)]
    parts += [_site(one, (i + 0.5) / len(sites), axis) for i, one in enumerate(sites)]
    ends = (("start", "0", "first to run"), ("end", "100%", "last"))
    parts += [element("text", said, class_="muted", x=x, y=_TALL + 20, text_anchor=side) for side, x, said in ends]
    wrong = [one.path for one in sites if one.diverges]
    says = f"{len(sites)} sites from left to right in order of execution, relative L2 upwards on a log scale. "
    says += f"{len(wrong)} diverge; the first is {wrong[0]}." if wrong else "None diverges."
    return charts.drawing("Distance of every site", says, _TALL + 26, *parts, sides="ch-left")


def _sites_key(sites: Sequence[SiteDistance]) -> Markup:
    entries = [("circle", "after", "isolated"), ("square", "before", "propagated")]
    return charts.key(*entries, *[("diamond", "bad", "diverges")] * any(one.diverges for one in sites))


def _site(one: SiteDistance, x: float, axis: Axis) -> Markup:
    places = [_TALL * (1 - axis.at(value)) for value in (one.isolated, one.propagated) if value is not None]
    parts = []
    if len(places) == 2:
        where = {"x1": charts.percent(x), "x2": charts.percent(x), "y1": places[0], "y2": places[1]}
        parts.append(element("line", class_="ch-link", **where))
    if one.propagated is not None:
        said = f"{one.path}: propagated {number(one.propagated)}"
        parts.append(charts.dot(x, places[-1], "before", said, mark="square", size=3))
    if one.isolated is not None:
        said = f"{one.path}: isolated {number(one.isolated)}" + (", diverges" if one.diverges else "")
        mark, colour = ("diamond", "bad") if one.diverges else ("circle", "after")
        parts.append(charts.dot(x, places[0], colour, said, mark=mark, size=4))
    return joined(parts)


def _tensors(tensors: Sequence[TensorDistance]) -> Markup | None:
    """Draw every tensor of a training step: what was found, and a short line for its limit."""
    if not tensors:
        return None
    axis = Axis.of_powers(value for one in tensors for value in (one.found, one.limit))
    parts = [charts.upwards(axis, _TALL, zero=True)]
    for i, one in enumerate(tensors):
        x, limit = (i + 0.5) / len(tensors), _TALL * (1 - axis.at(one.limit))
        if math.isfinite(one.limit):
            half = min(0.012, 0.4 / len(tensors))
            ends = {"x1": charts.percent(x - half), "x2": charts.percent(x + half)}
            parts.append(element("line", class_="ch-limit stroke-ink", y1=limit, y2=limit, **ends))
        mark, colour = _KINDS[one.kind] if one.passed else ("diamond", "bad")
        said = f"{one.words}: found {number(one.found)}, limit {number(one.limit)}"
        parts.append(charts.dot(x, _TALL * (1 - axis.at(one.found)), colour, said, mark=mark, size=3.5))
    wrong = sum(not one.passed for one in tensors)
    says = f"{len(tensors)} tensors from left to right, distances on a log scale; {wrong} are beyond their limit."
    return charts.drawing("Tensors of a step", says, _TALL + 8, *parts, sides="ch-left")


def _tensors_key(tensors: Sequence[TensorDistance]) -> Markup:
    entries: list[tuple[str, str, str]] = [(*_KINDS[kind], kind) for kind in dict.fromkeys(one.kind for one in tensors)]
    entries += [("diamond", "bad", "beyond its limit")] * any(not one.passed for one in tensors)
    return charts.key(*entries, ("line", "ink", "limit"))


def _site_row(one: SiteDistance) -> tuple[str, str, str, str, str, bool]:
    kind = one.kind_a if one.kind_a == one.kind_b else f"{one.kind_a or '—'} → {one.kind_b or '—'}"
    ulps = "—" if one.ulps is None else f"{one.ulps:.3g}"
    return one.path, kind, number(one.isolated), number(one.propagated), ulps, one.diverges
