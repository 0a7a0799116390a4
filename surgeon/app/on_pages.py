"""The command that makes a page. torch is imported only when needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.app.options import Force, Model, about_models
from surgeon.app.program import command
from surgeon.app.terminal import bar

if TYPE_CHECKING:
    from surgeon.app.given import Given


@command("Example: surgeon report model.acnet.pt model.acnet.fused.pt -o report.html")
@about_models
def report(
    model: Model,
    given: "Given",
    other: Annotated[
        str | None,
        typer.Argument(metavar="B", help="A model to compare with it, as verify does.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Show what this recipe would make of it; nothing is changed.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Show what this plan file would make of it.")] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Also time them, as bench does.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="Where to write it.")] = Path(
        "report.html"
    ),
    force: Force = False,
) -> None:
    """Write a page about a model: its convs, their costs, its history.

    The page is one HTML file that loads nothing. With a second model it shows how far that is from the first.
    """
    if recipe is not None and plan is not None:
        raise typer.BadParameter("give either --recipe or --plan")
    with bar() as progress:
        from surgeon.app import pages

        names = [model] if other is None else [model, other]
        pages.report(names, given, output, progress, recipe=recipe, plan=plan, bench=bench, force=force)
