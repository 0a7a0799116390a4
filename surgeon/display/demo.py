"""The steps of the demo as a table with the report below it, and as data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.report import report_view
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.app.demo.run import Demo


def demo_view(demo: Demo) -> RenderableType:
    train, test = demo.images
    table = words.table("step", "file", f"accuracy on {test} test images", "parameters", "MACs")
    for step in demo.steps:
        table.add_row(step.name, step.file, f"{step.accuracy:.1%}", words.amount(step.params), words.amount(step.macs))
    note = (
        f"Fashion-MNIST: {train} training images, {test} test images. This shows the workflow; it does not rank methods"
    )
    heading = Line("the folded network compared with the trained one:")
    return Group(table, Line(note, "dim"), Line(""), heading, report_view(demo.report))


def demo_data(demo: Demo) -> dict[str, Any]:
    return {**asdict(demo), "report": demo.report.to_dict()}
