"""What was exported: the file, what it takes and gives, and how it compares with the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.surgery.export import Exported


def exported_view(exported: Exported) -> RenderableType:
    """Show the file, its inputs and outputs, and the verdict with its checks."""
    opset = f", opset {exported.facts['opset']}" if "opset" in exported.facts else ""
    lines = [f"{exported.kind}{opset}, {words.amount(exported.bytes)}B; blocks left: {exported.blocks}"]
    lines += [f"input {one}" for one in exported.inputs]
    lines += [f"output {one}" for one in exported.outputs]
    lines += exported.notes
    lines += [f"{check.name}: {check.says}" for check in exported.report.checks]
    lines += exported.report.remarks
    verdict = f"{exported.report.verdict}: the file was run, and computes what the network does"
    return Group(*map(Line, lines), Line(verdict, "bold green"), Line(f"written: {exported.path}"))
