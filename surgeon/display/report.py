"""A report of verify: the checks, the distances, the sites that say something, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.agreement import agreement_view
from surgeon.display.sheet import Line, Sheet, cell

if TYPE_CHECKING:
    from surgeon.proof.report import Report, SiteDistance, TensorDistance

_VERDICTS = {
    "equivalent": ("bold green", "equivalent: B computes what A computes"),
    "different": ("bold red", "different: B does not compute what A computes"),
    "approximate": ("bold yellow", "approximate by design: these distances do not prove that B equals A"),
}


def report_view(report: Report, *, verdict_first: bool = False) -> RenderableType:
    """Show the checks, the distances and the sites; the verdict last, where a terminal stops, or first."""
    parts: list[RenderableType] = [
        Line(f"{check.name}: {check.says}", "", *(("  ok  ", "green") if check.passed else (" FAIL ", "bold red")))
        for check in report.checks
    ]
    parts += [_distances(report)] if report.distances else []
    if rows := list(_telling(report.sites)):
        parts.append(_sites(rows, len(report.sites)))
    if wrong := [one for one in report.tensors if not one.passed]:
        parts.append(_tensors(wrong))
    if report.first_to_diverge:
        parts.append(Line(f"first to diverge: {report.first_to_diverge}", "red"))
    parts += [Line(said, "red") for said in (*report.why(), *report.remarks)]
    parts += [] if report.data is None else [agreement_view(report.data)]
    style, said = _VERDICTS[report.verdict]
    verdict = Line(said, style)
    return Group(verdict, *parts) if verdict_first else Group(*parts, verdict)


def _distances(report: Report) -> Sheet:
    table = words.table("input", "float64", report.dtype, "max abs", "max rel", "SQNR dB", "cosine", "top-1 same")
    for row in report.distances:
        top1 = "" if row.top1 is None else f"{row.top1:.1%}"
        distances = (row.float64, row.own, row.max_abs, row.max_rel)
        numbers = ["" if n is None else f"{n:.1e}" if math.isfinite(n) else "—" for n in distances]
        decibels = f"{row.sqnr_db:.1f}" if math.isfinite(row.sqnr_db) else "exact" if row.own == 0 else "—"
        table.add_row(row.input, *numbers, decibels, f"{row.cosine:.9f}" if math.isfinite(row.cosine) else "—", top1)
    return table


def _tensors(wrong: Sequence[TensorDistance]) -> Sheet:
    table = words.table("tensor", "against", "relative L2", "at most", "")
    for one in wrong[: words.MOST_ROWS]:
        table.add_row(one.words, one.against, f"{one.found:.1e}", f"{one.limit:.0e}", cell("diverges", "red"))
    if len(wrong) > words.MOST_ROWS:
        table.caption = f"{words.MOST_ROWS} of {len(wrong)} tensors that diverge; --json lists all that were compared"
    return table


def _telling(sites: Sequence[SiteDistance]) -> Iterator[SiteDistance]:
    """Choose the sites worth a row: those that diverge, and those whose class has changed."""
    for site in sites:
        if site.diverges or site.kind_a != site.kind_b:
            yield site


def _sites(rows: Sequence[SiteDistance], count: int) -> Sheet:
    table = words.table("site", "A", "B", "isolated", "propagated", "stored, ulp", "")
    diverging = [site for site in rows if site.diverges]
    chosen = diverging or rows
    shown = chosen[: words.MOST_ROWS]
    for site in shown:
        ulps = "" if site.ulps is None else f"{site.ulps:.3g}"
        distances = ["—" if far is None else f"{far:.1e}" for far in (site.isolated, site.propagated)]
        mark = cell("diverges", "red") if site.diverges else ""
        table.add_row(site.path, site.kind_a, site.kind_b, *distances, ulps, mark)
    if len(shown) < len(rows):
        kind = "sites that diverge" if diverging else "changed sites"
        which = f"these are the {kind}" if shown == chosen else f"these are {len(shown)} of {len(chosen)} {kind}"
        which = "this is the only site that diverges" if len(chosen) == 1 else which
        table.caption = f"{which}; --json lists all {count} sites"
    return table
