"""The module tree, with every conv marked by what happens to it."""

from __future__ import annotations

from collections import Counter

from markupsafe import Markup

from surgeon.page.bars import pair
from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.markup import filled
from surgeon.page.rows import MARKS, MEANINGS, TITLES, UNITS, Costs, rows, shown_model
from surgeon.page.tree import tree


class Network(Section):
    """Which convs there are, what becomes of each and why, and what that costs: to be searched by name and by state."""

    title = "Network"
    anchor = "network"
    place = 20

    def applies(self, data: PageData) -> bool:
        return bool(rows(data))

    def body(self, data: PageData) -> Markup:
        found, shown = rows(data), shown_model(data)
        first: Costs = next((name for name in TITLES if any(name in row.costs for row in found)), "params")
        costs = [row.costs[first] for row in found if first in row.costs]
        counts = Counter(row.state for row in found)
        return filled(
            "network.html",
            root=tree(shown.parts if shown is not None else (), found),
            model=shown.name if shown is not None else data.title,
            states=[(state, MARKS[state], MEANINGS[state], counts[state]) for state in MARKS if counts[state]],
            total=len(found),
            main=first,
            main_title=TITLES[first],
            most=max((max(cost.before, cost.after) for cost in costs), default=0),
            pair=pair,
            titles=TITLES,
            units=UNITS,
        )
