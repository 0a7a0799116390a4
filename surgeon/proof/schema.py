"""The JSON Schema of what `verify --json` prints, made from the classes that hold it.

JSON has no number for infinity and none for NaN: they are the texts inf, -inf and nan. A field that is added later is
no other version; one that changes its meaning or goes is.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from surgeon.proof.report import SCHEMA, Report

_NUMBER = {"$ref": "#/$defs/Number"}
_NUMBERS = {"description": "A number.", "anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_NAME = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_OLD = "The old name of the field that is said to diverge."


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema of a report."""
    made = _with_words(TypeAdapter(Report).json_schema(mode="serialization"))
    own = {
        "schema": {"const": SCHEMA},
        "equivalent": {"type": "boolean"},
        "first_to_diverge": {**_NAME, "description": "The first site, in order of execution, that diverges."},
        "first_to_part": {**_NAME, "description": _OLD, "deprecated": True},
    }
    made["properties"] = own | made["properties"]
    made["required"] = [*own, *made["required"]]
    made["$defs"]["Number"] = _NUMBERS
    site = made["$defs"]["SiteDistance"]
    site["properties"]["parts"] = {"type": "boolean", "description": _OLD, "deprecated": True}
    site["required"] = [*site["required"], "parts"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:surgeon:{SCHEMA}"}
    return {**head, **made, "title": "A report of surgeon verify"}


def _with_words(schema: Any) -> Any:
    """Let every number be one of the texts that stand for those that JSON does not have."""
    if isinstance(schema, list):
        return [_with_words(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_words(value) for key, value in schema.items() if not _is_title(key, value)}
    if found.get("type") == "number":
        rest = {key: value for key, value in found.items() if key not in ("type", "default")}
        return {**rest, **_NUMBER}
    return found


def _is_title(key: str, value: Any) -> bool:
    """Whether this is a title that pydantic has made of a name, and not a field that is called so."""
    return key == "title" and isinstance(value, str)
