"""Error messages about files that several readers need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from surgeon.errors import ModelError


def missing(path: Path) -> ModelError:
    """Say that there is no such file, and which one may be meant."""
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := difflib.get_close_matches(path.name, names):
        return ModelError(f"there is no file {path}", todo=f"Did you mean {path.parent / near[0]}?")
    return ModelError(
        f"there is no file {path}", todo="A network of a library is named like this: torchvision:resnet50"
    )


def damaged(path: Path, error: Exception) -> ModelError:
    """Say that a file cannot be read to its end."""
    why = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
    return ModelError(f"{path} is damaged or cut short: {why}", todo="Copy or download it again.")


def compiled(path: Path, what: str) -> ModelError:
    """Say that a file holds a compiled program, not modules."""
    return ModelError(f"{path} is {what}: it holds no modules", todo="Name the nn.Module that it was made from.")


def few(words: Iterable[str]) -> str:
    """Name the first three, and say how many more there are.

    >>> few("abcde")
    'a, b, c, … 2 more'
    """
    words = list(words)
    return ", ".join(words[:3]) + (f", … {len(words) - 3} more" if len(words) > 3 else "")
