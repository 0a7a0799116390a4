"""The commands about what surgeon brings along: recipes, blocks, the demo."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.app.options import Json, Seed, about_models
from surgeon.app.program import command
from surgeon.app.terminal import bar, show, show_file

if TYPE_CHECKING:
    from surgeon.app.given import Given


@command("Example: surgeon recipes acnet > mine.yaml   ·   surgeon recipes --for model.pt")
@functools.partial(about_models, only_with="model")
def recipes(
    given: "Given | None",
    name: Annotated[str | None, typer.Argument(help="Print this bundled recipe.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--for", metavar="MODEL", help="Say for each recipe what it would do to this model.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    json: Json = False,
) -> None:
    """List the recipes, print one, or compare them for a model.

    All other options say how that model is read.
    """
    if given is not None and model is not None:
        if name is not None or schema:
            raise typer.BadParameter("--for plans all bundled recipes; `surgeon plan MODEL --recipe NAME` plans one")
        with bar() as progress:
            from surgeon.app import commands

            advice = commands.recipes_for(model, given, progress)
        show(advice.to_dict() if json else advice)
        return
    from surgeon.display.recipes import recipes_data, recipes_view
    from surgeon.recipes import recipe
    from surgeon.recipes import schema as schemas

    if schema:
        show(schemas.json_schema())
    elif name is not None:
        found = recipe.load(name)
        show(recipes_data([found])[0]) if json else show_file(found.text)
    else:
        known = [recipe.load(each) for each in recipe.bundled()]
        show(recipes_data(known) if json else recipes_view(known))


@command("Example: surgeon blocks --json")
def blocks(json: Json = False) -> None:
    """List the blocks that a recipe can swap in, with their options."""
    from surgeon.blocks import registry
    from surgeon.display.blocks import blocks_data, blocks_view

    show(blocks_data(registry()) if json else blocks_view(registry()))


@command("Example: surgeon demo --seconds 20")
def demo(
    seconds: Annotated[float, typer.Option(min=1, help="How long to train the network with ACBlocks.")] = 6,
    folder: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="Keep the models that are made in this folder.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Convert, train, fold, verify and fit a small network, offline. Its images are from Fashion-MNIST."""
    from surgeon.app.demo import run
    from surgeon.display.demo import demo_data, demo_view

    with bar() as progress:
        steps = run.demo(progress, seconds=seconds, folder=folder, seed=seed)
    show(demo_data(steps) if json else demo_view(steps))
