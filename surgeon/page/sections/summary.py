"""What this page is about, and what came of it, in a few figures."""

from __future__ import annotations

from markupsafe import Markup

from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.markup import filled


class Summary(Section):
    """What this is, how much of it was swapped, what that costs, and the verdict."""

    title = "Summary"
    anchor = "summary"
    place = 10

    def applies(self, data: PageData) -> bool:
        return bool(data.models)

    def body(self, data: PageData) -> Markup:
        return filled("summary.html", data=data)
