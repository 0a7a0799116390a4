"""The sections of the page: one file for each, found by listing this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from surgeon.page.base import Section


@cache
def sections() -> tuple[Section, ...]:
    """Make one instance of every section in this folder, in the order of their places.

    >>> [one.anchor for one in sections()][:3]
    ['summary', 'network', 'streams']
    """
    found: list[Section] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Section)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        found += [kind() for kind in own if not inspect.isabstract(kind)]
    return tuple(sorted(found, key=lambda one: (one.place, one.anchor)))
