"""The bundled recipes as a list, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.display import words

if TYPE_CHECKING:
    from surgeon.recipes.recipe import Recipe


def recipes_view(recipes: Sequence[Recipe]) -> RenderableType:
    table = words.table("recipe", "what it does", "source")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.title, recipe.cites or "")
    return Group(table, Text("`surgeon recipes NAME` prints one; copy it to start your own"))


def recipes_data(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [
        {"name": recipe.name, "title": recipe.title, "cites": recipe.cites, "text": recipe.text} for recipe in recipes
    ]
