"""What every conv costs, before and after."""

from __future__ import annotations

from markupsafe import Markup

from surgeon.page.bars import chart
from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.markup import filled
from surgeon.page.rows import TITLES, UNITS, rows, totals


class Costs(Section):
    """Where multiply-adds, parameters and activations are, conv by conv, and how much of them goes."""

    title = "Costs"
    anchor = "costs"
    place = 40

    def applies(self, data: PageData) -> bool:
        return any(row.costs for row in rows(data))

    def body(self, data: PageData) -> Markup:
        found = [row for row in rows(data) if row.costs]
        names = [name for name in TITLES if any(name in row.costs for row in found)]
        has_after = any(cost.before != cost.after for row in found for cost in row.costs.values())
        charts = []
        for name in names:
            entries = [(row.path, row.costs[name]) for row in found if name in row.costs]
            title = f"{TITLES[name]} of every conv" + (", before and after" if has_after else "")
            about = f"A bar for each of {len(entries)} convs, in their order; the table below has the numbers."
            charts.append((name, TITLES[name], chart(title, about, entries, UNITS[name])))
        return filled(
            "costs.html",
            charts=charts,
            rows=found,
            names=names,
            titles=TITLES,
            units=UNITS,
            has_after=has_after,
            totals=totals(data),
        )
