"""Which blocks there are: those in this folder, and those that other installed distributions bring.

A distribution brings a block by an entry point of the group `surgeon.blocks`, in its pyproject.toml:

    [project.entry-points."surgeon.blocks"]
    myblock = "mypackage.myblock:MyBlock"

Recipes call it by its `name`. A block that cannot be used, or whose name is taken, is an error: otherwise that would go
unnoticed.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from surgeon.blocks.base import Block, BlockOptions
from surgeon.blocks.two_streams import TwoStreamBlock, TwoStreamOptions
from surgeon.errors import BlockError

GROUP = "surgeon.blocks"
_OURS = "surgeon itself"


@cache
def registry() -> dict[str, type[Block]]:
    """Find every block: name → class, sorted by name.

    Raises:
        BlockError: what another distribution brings is not a block, or has the name of another one.
    """
    found: dict[str, type[Block]] = {block.name: block for block in _own()}
    origins = dict.fromkeys(found, _OURS)
    for point in sorted(entry_points(group=GROUP), key=lambda one: (_origin(one), one.name)):
        block = _loaded(point)
        if found.get(block.name, block) is not block:
            raise BlockError(
                f"{_origin(point)} brings a block called {block.name!r}, and so does {origins[block.name]}",
                todo="Rename its block, or uninstall it.",
            )
        found[block.name], origins[block.name] = block, _origin(point)
    return dict(sorted(found.items()))


def _own() -> Iterator[type[Block]]:
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{__package__}.{info.name}")
        for value in vars(module).values():
            is_block = isinstance(value, type) and issubclass(value, Block) and not inspect.isabstract(value)
            if is_block and "name" in vars(value):  # one that inherits its name is another form of that block
                yield value


def _loaded(point: EntryPoint) -> type[Block]:
    """Import the block that an entry point names."""
    what = f"{point.value}, which {_origin(point)} brings as a block,"
    try:
        found: Any = point.load()
    except Exception as error:  # importing runs the package, which may raise anything
        why = (str(error).splitlines() or [""])[0].rstrip(".")
        raise BlockError(
            f"{what} cannot be imported: {type(error).__name__}: {why}", todo="Fix that distribution, or uninstall it."
        ) from error
    if (why_not := _fault(found)) is not None:
        raise BlockError(f"{what} {why_not}", todo="Fix that distribution, or uninstall it.")
    block: type[Block] = found
    return block


def _fault(found: Any) -> str | None:
    """Say what keeps a value from being a block."""
    if not (isinstance(found, type) and issubclass(found, Block)):
        return "is not a subclass of surgeon.Block"
    if inspect.isabstract(found):
        return f"does not define {', '.join(sorted(found.__abstractmethods__))}"
    for name in ("name", "title", "paper"):
        if not isinstance(getattr(found, name, None), str):
            return f"needs a string as its `{name}`"
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, BlockOptions)):
        return "needs a subclass of surgeon.BlockOptions as its `Options`"
    if issubclass(found, TwoStreamBlock) and not issubclass(options, TwoStreamOptions):
        return "is a TwoStreamBlock, and needs a subclass of TwoStreamOptions as its `Options`"
    return None


def _origin(point: EntryPoint) -> str:
    return f"the distribution {point.dist.name}" if point.dist is not None else "a distribution without a name"
