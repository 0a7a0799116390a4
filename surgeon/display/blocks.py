"""The blocks with their options as tables, and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.blocks import Block


def blocks_view(blocks: Mapping[str, type[Block]]) -> RenderableType:
    parts: list[RenderableType] = []
    for name, block in blocks.items():
        parts += [Line(block.title, "", f"{name}: ", "bold"), Line(f"  {block.paper}")]
        table = words.table("  option", "default", "meaning")
        for option, field in block.Options.model_fields.items():
            table.add_row(f"  {option}", str(field.default), field.description or "")
        parts.append(table)
    return Group(*parts)


def blocks_data(blocks: Mapping[str, type[Block]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "title": block.title, "paper": block.paper, "options": block.Options.model_json_schema()}
        for name, block in blocks.items()
    ]
