"""The steps of the demo as a table with the report below it, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.kernels import kernels_view
from surgeon.display.report import report_view
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.app.demo.run import Demo, Snapshot

_KEEP = "report.html to look at it all: surgeon demo --keep FOLDER leaves it there, with the models"


def demo_view(demo: Demo) -> RenderableType:
    train, test = demo.images
    note = f"Fashion-MNIST, accuracy on {test} test images. This shows the workflow; it does not rank methods"
    return Group(
        Line(f"trained further as ACBlocks on {train} images; folded back, they cost nothing:"),
        _steps(demo.steps),
        Line(""),
        Line(f"made cheaper as octaves, fitted to {train} images without labels and not trained:"),
        _steps(demo.octave),
        Line(note, "dim"),
        Line(""),
        Line("the folded network compared with the trained one:"),
        report_view(demo.report),
        Line(""),
        Line("where in their kernels the first network and the folded one have their large weights:"),
        kernels_view(demo.kernels),
        Line(""),
        Line(f"open {demo.page or _KEEP}"),
    )


def _steps(steps: Sequence[Snapshot]) -> RenderableType:
    """A row for each step of one way."""
    table = words.table("step", "file", "accuracy", "parameters", "MACs")
    for step in steps:
        table.add_row(step.name, step.file, f"{step.accuracy:.1%}", words.amount(step.params), words.amount(step.macs))
    return table


def demo_data(demo: Demo) -> dict[str, Any]:
    return {**asdict(demo), "report": demo.report.to_dict(), "kernels": demo.kernels.to_dict()}
