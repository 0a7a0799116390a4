"""The blocks: every subclass of `Block` in this folder, by the name that recipes use."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from surgeon.blocks.base import Block, BlockOptions, Deployable, Example, Foldable, Operator

__all__ = ["Block", "BlockOptions", "Deployable", "Example", "Foldable", "Operator", "registry"]


@cache
def registry() -> dict[str, type[Block]]:
    """Find every block in this folder: name → class, sorted by name."""
    found: dict[str, type[Block]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Block) and not inspect.isabstract(value):
                found[value.name] = value
    return dict(sorted(found.items()))
