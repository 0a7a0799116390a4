"""What there is to show → one file of HTML that holds all it needs: its style, its script, its drawings."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from markupsafe import Markup

from surgeon.page.data import PageData
from surgeon.page.markup import filled
from surgeon.page.sections import sections


def render(data: PageData) -> str:
    """Write the page: the sections that have something to show, in their order.

    The same data gives the same text. Nothing is loaded from anywhere, and no other script or style would run in it.
    """
    shown = [(one, one.body(data)) for one in sections() if one.applies(data)]
    style, script = _all_of(".css"), _all_of(".js")
    return str(
        filled(
            "page.html",
            data=data,
            sections=shown,
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; style-src {_hash_of(style)}; script-src {_hash_of(script)}; "
            "base-uri 'none'; form-action 'none'",
        )
    )


@cache
def _all_of(suffix: str) -> str:
    """Put the files of one kind one behind the other, those of the page itself first."""
    files = [
        one for one in resources.files("surgeon.page").joinpath("templates").iterdir() if one.name.endswith(suffix)
    ]
    files.sort(key=lambda one: (not one.name.startswith("page"), one.name))
    return "\n" + "\n".join(one.read_text(encoding="utf-8").strip() for one in files) + "\n"


def _hash_of(text: str) -> str:
    """Name a text inside the page, so that it and nothing else is let run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
