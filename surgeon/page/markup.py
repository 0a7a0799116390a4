"""Markup that is safe to put into a page: elements whose texts and attributes are escaped, and filled templates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from surgeon.display import words
from surgeon.errors import printable

_Child = object  # text, a number, markup, or a list of these


def element(name: str, *children: _Child, **attributes: object) -> Markup:
    """Make an element; text and attributes are escaped, and attributes that are None or False are left out.

    An underscore in the name of an attribute is a hyphen, and one at its end is dropped.

    >>> element("text", "a < b", class_="axis", text_anchor="end", x=1.50001, hidden=None)
    Markup('<text class="axis" text-anchor="end" x="1.5">a &lt; b</text>')
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inside = joined(children)
    if not inside and name in _EMPTY:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inside}</{name}>")


_EMPTY = {"rect", "line", "circle", "path", "polyline", "polygon", "use", "ellipse", "br", "hr", "input", "col"}


def joined(children: Iterable[_Child]) -> Markup:
    """Put texts and elements one behind the other; lists are opened, and None is nothing."""
    return Markup("").join(_one(child) for child in children if child is not None)


def _one(child: _Child) -> Markup:
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return joined(child)
    return text(child)


def text(said: object) -> Markup:
    """Escape a text, and write signs that would steer what shows it as their codes."""
    return escape(printable(_number(said)))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    said = name.rstrip("_").replace("_", "-") if name != "viewBox" else name
    return f" {said}" if value is True else f' {said}="{text(value)}"'


def _number(value: object) -> str:
    """Write numbers of drawings with two digits behind the point.

    >>> _number(3.0), _number(2.3456)
    ('3', '2.35')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def filled(template: str, **values: Any) -> Markup:
    """Fill a template of the folder `templates`; whatever is put in is escaped, unless it is markup."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("surgeon.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value), keep="\n\t"),
    )
    made.filters["amount"] = words.amount
    return made
