"""What the steps of a graph do to the axis of the channels, found by listing this folder.

A step that is not known here fixes the orders of all that it reads: how it treats a channel may depend on where the
channel lies.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from surgeon.channels.values import Handler, Table
from surgeon.octave.layout import Step


@cache
def tables() -> tuple[Table, ...]:
    """Give the tables of all files in this folder, sorted by their names."""
    files = pkgutil.iter_modules(__path__)
    return tuple(importlib.import_module(f"{__name__}.{file.name}").TABLE for file in files)


def handler_of(step: Step) -> Handler | None:
    """Find what a step does to channels; None where that is not known."""
    if step.is_customised:
        return None
    others = (handler for table in tables() for is_one, handler in table.others if is_one(step))
    return next((found for table in tables() if (found := table.of(step)) is not None), None) or next(others, None)
