"""The command that looks at kernels. torch is imported only when needed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.app.options import Force, Json, about_models
from surgeon.app.program import command
from surgeon.app.terminal import bar, show

if TYPE_CHECKING:
    from surgeon.app.given import Given

_log = logging.getLogger("surgeon")


@command("Example: surgeon kernels net.pt net.acnet.fused.pt -o kernels.svg")
@about_models
def kernels(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A [B …]", help="The models, which are shown side by side.", show_default=False),
    ],
    given: "Given",
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every conv as well, and the branches of blocks.")
    ] = False,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Show the same with freshly drawn weights beside it.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Draw the matrices as .png or .svg.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show which taps of kernels are large, as the ACNet paper does.

    For each shape of kernels: the magnitudes summed over filters and channels, divided by the largest sum, and averaged
    over convs. Blocks are shown as they are folded. Also shown: how much each branch counts, the energy that HetConvs
    keep, and what the low streams of octaves cannot hold.
    """
    with bar() as progress:
        from surgeon.app import seen
        from surgeon.display.kernels import kernels_view

        found = seen.kernels(models, given, progress, control=control, picture=output, layers=layers, force=force)
    show(found.to_dict() if json else kernels_view(found, layers=layers))
    if output is not None:
        _log.info(f"written: {output}")
