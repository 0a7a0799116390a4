"""The JSON Schema of recipes, which editors use to complete and check them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from surgeon.blocks import registry
from surgeon.recipes.recipe import RecipeForm


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema of the format, for editors."""
    blocks = {name: block.Options for name, block in registry().items()}
    models: list[type[BaseModel]] = [RecipeForm, *blocks.values()]
    refs, made = models_json_schema([(model, "validation") for model in models], title="A surgeon recipe")
    for key in made["$defs"]["Match"]["properties"].values():
        key.pop("default", None)  # the default is that the key is absent, which no value can say
    rule = made["$defs"]["RuleForm"]
    rule["properties"]["swap"] = {"enum": list(blocks), "description": "the block to put in place of the conv"}
    rule["oneOf"] = [{"required": ["swap"]}, {"required": ["leave"], "properties": {"with": False}}]
    rule["allOf"] = [
        {
            "if": {"properties": {"swap": {"const": name}}, "required": ["swap"]},
            "then": {"properties": {"with": refs[options, "validation"]}},
        }
        for name, options in blocks.items()
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, **refs[RecipeForm, "validation"]}
