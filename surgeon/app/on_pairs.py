"""The command that compares two models. torch is imported only when needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.app.options import Force, Html, Json, about_images, about_models
from surgeon.app.program import command
from surgeon.app.terminal import bar, show

if TYPE_CHECKING:
    from surgeon.app.given import Given
    from surgeon.app.images import Images


def _show_schema(asked: bool) -> None:
    """Print the schema, whatever else is asked for."""
    if asked:
        from surgeon.proof.schema import json_schema

        show(json_schema())
        raise typer.Exit


Schema = Annotated[
    bool,
    typer.Option(
        "--schema", callback=_show_schema, is_eager=True, help="Print the JSON Schema of what --json prints, and end."
    ),
]
JUnit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", help="Also write an .xml that CI shows as tests: a case for each check."),
]
Markdown = Annotated[
    str | None,
    typer.Option("--markdown", metavar="FILE", help="Also write a summary as .md for GitHub; - prints it instead."),
]


@command("Example: surgeon verify model.acnet.pt model.acnet.fused.pt   exits 0 if they are equivalent")
@about_models
@about_images
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference model.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)],
    given: "Given",
    images: "Images | None",
    html: Html = None,
    json: Json = False,
    schema: Schema = False,
    junit: JUnit = None,
    markdown: Markdown = None,
    force: Force = False,
) -> None:
    """Say whether B computes what A does, and where they diverge. Distances are shown as well.

    With --data, both are also run on images: how often they agree, and with --labels how right each of them is. Under
    torchrun every process takes its share of the images.

    Exit code: 0 equivalent, 1 different, 2 could not be compared, 3 approximate by design.
    """
    if json and markdown == "-":
        raise typer.BadParameter("--json and --markdown - both print: give --markdown a file, or take one away")
    with bar() as progress:
        from surgeon.app import outputs, pairs
        from surgeon.app.reports import Reports
        from surgeon.display.report import report_view

        reports = Reports(junit, markdown, force)
        reports.claim(pairs.read_for(a, b, given, images))
        outputs.claim_page(html, given, a, b, force=force)
        found = pairs.verify(a, b, given, progress, images=images)
        if html is not None and found is not None:
            from surgeon.app import pages

            pages.of_files(html, [a, b], given, force=force, report=found)
    if found is None:  # another process says it
        return
    reports.write(found, a, b)
    if not reports.is_on_screen:
        show(found.to_dict() if json else report_view(found))
    raise typer.Exit({"equivalent": 0, "different": 1, "approximate": 3}[found.verdict])
