"""The JSON Schema, which editors check recipes with, says what the reader says."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from yamls import faults, rules

from surgeon.blocks import registry
from surgeon.recipes import recipe
from surgeon.recipes.schema import json_schema


def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_the_schema_accepts_every_bundled_recipe():
    for file in recipe.bundled().values():
        schema().validate(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "rule",
    [
        "{leave: x, match: {name: a, not: {size: {min: 3}}}, optional: true}",
        "{swap: acblock}",
        "{swap: acblock, match: {kernel: [3, 1x7, {max: 5}], groups: [depthwise, 2], followed_by: [ReLU]}}",
        "{swap: acblock, with: {init: scratch, gamma: 0.5}}",
    ],
)
def test_the_schema_accepts_what_is_read(rule: str):
    text = rules(f"  - {rule}\n")
    recipe.parse(text, "a.yaml")
    schema().validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "rule",
    [
        "{}",
        "{swap: acblok}",
        "{swap: acblock, leave: x}",
        "{leave: x, with: {}}",
        "{leave: x, optoinal: true}",
        "{leave: x, match: {kernal: 3}}",
        "{leave: x, match: {kernel: 0}}",
        "{leave: x, match: {kernel: []}}",
        "{leave: x, match: {kernel: {mn: 3}}}",
        "{leave: x, match: {not: {foo: 3}}}",
        "{leave: x, match: {groups: depthwize}}",
        "{swap: acblock, with: {init: takeovr}}",
        "{swap: acblock, with: {alpha: 1}}",
    ],
)
def test_the_schema_and_the_reader_refuse_alike(rule: str):
    text = rules(f"  - {rule}\n")
    assert faults(text)
    assert not schema().is_valid(yaml.safe_load(text))


def test_the_schema_names_the_blocks():
    assert set(registry()) <= set(
        json.loads(json.dumps(json_schema()))["$defs"]["RuleForm"]["properties"]["swap"]["enum"]
    )
