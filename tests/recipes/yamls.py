"""Recipes as text, of which the tests write what matters to them."""

from __future__ import annotations

import pytest
from hypothesis import settings

from surgeon.conv.spec import ConvSpec
from surgeon.errors import RecipeError
from surgeon.recipes import recipe

HEAD = "surgeon: 1\ntitle: T\n"
SPEC = ConvSpec(8, 16, (3, 3), stride=(2, 2), padding=(1, 1))
unhurried = settings(deadline=None, derandomize=True)


def rules(text: str) -> str:
    """Put rules below a head."""
    return HEAD + "rules:\n" + text


def faults(text: str, *overrides: str) -> list[str]:
    """Read a recipe that is wrong; what is wrong with it."""
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, "a.yaml", overrides)
    return [str(fault) for fault in caught.value.faults]
