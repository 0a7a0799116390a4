"""The command that compares two models. torch is imported only when needed."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from surgeon.app.options import Json, about_models
from surgeon.app.program import command
from surgeon.app.terminal import bar, show

if TYPE_CHECKING:
    from surgeon.app.given import Given


@command("Example: surgeon verify model.acnet.pt model.acnet.fused.pt   exits 0 if they are equivalent")
@about_models
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference model.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)],
    given: "Given",
    mode: Annotated[
        Literal["eval", "train"],
        typer.Option(help="train: also compare a step in train mode, and the statistics of norms behind it."),
    ] = "eval",
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also compare the gradients of inputs and of shared parameters.")
    ] = False,
    json: Json = False,
) -> None:
    """Say whether B computes what A does, and where they diverge. Distances are shown as well.

    Exit code: 0 equivalent, 1 different, 2 could not be compared, 3 approximate by design.
    """
    with bar() as progress:
        from surgeon.app import pairs
        from surgeon.display.report import report_view

        found = pairs.verify(a, b, given, progress, mode=mode, gradients=gradients)
    show(found.to_dict() if json else report_view(found))
    raise typer.Exit({"equivalent": 0, "different": 1, "approximate": 3}[found.verdict])
