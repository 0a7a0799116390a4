"""The bundled recipes as a list, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.recipes.recipe import Recipe


def recipes_view(recipes: Sequence[Recipe]) -> RenderableType:
    table = words.table("recipe", "source", "what it does")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.cites or "", recipe.title)
    return Group(table, Line("`surgeon recipes NAME` prints one; copy it to start your own"))


def recipes_data(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [
        {"name": recipe.name, "title": recipe.title, "cites": recipe.cites, "text": recipe.text} for recipe in recipes
    ]
