"""The commands that make models of models. torch is imported only when needed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.app.options import (
    Bake,
    Distil,
    DynamicSize,
    Force,
    Html,
    Json,
    Kept,
    Model,
    Opset,
    Output,
    Python,
    Sets,
    State,
    Time,
    about_images,
    about_models,
    one_dtype,
)
from surgeon.app.program import command
from surgeon.app.terminal import bar, show

if TYPE_CHECKING:
    from surgeon.app.given import Given
    from surgeon.app.images import Images

_log = logging.getLogger("surgeon")


@command("Example: surgeon convert model.pt --recipe acnet.yaml   writes model.acnet.pt")
@about_models
@about_images
def convert(
    model: Model,
    given: "Given",
    images: "Images | None",
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A recipe: a file, or the name of a bundled one.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan file instead of a recipe.")] = None,
    sets: Sets = None,
    bake: Bake = False,
    output: Output = None,
    force: Force = False,
    time: Time = False,
    distil: Distil = 0,
    state: State = None,
    cache: Kept = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Swap the convs of a model as a recipe or a plan says. What was done is checked, and the result saved.

    With --data, blocks that only approximate their convs are fitted to what these gave on images without labels.
    """
    if images is None and (distil or state or cache):
        raise typer.BadParameter("--distil, --resume and --cache are for fitting: give images, --data SOURCE")
    if (recipe is None) == (plan is None):
        raise typer.BadParameter("give either --recipe or --plan, for example --recipe acnet")
    if plan is not None and sets:
        raise typer.BadParameter("--set changes a recipe; edit the plan file instead")
    with bar() as progress:
        from surgeon.app import commands, outputs
        from surgeon.display.convert import converted_data, converted_view
        from surgeon.fitting.fit import How
        from surgeon.fitting.fitted import Settings
        from surgeon.surgery import plan as plans

        how = plans.read(plan) if plan is not None else str(recipe)
        outputs.claim_page(html, given, model, recipe, plan, output, force=force)
        looked: list[Any] = []
        done = commands.convert(
            model,
            how,
            given,
            progress,
            overrides=sets or (),
            bake=bake,
            output=output,
            force=force,
            time=time,
            images=images,
            fitting=Settings(How(seed=given.seed), distil, state, cache),
            look=looked.append,
        )
        if html is not None and done is not None:
            from surgeon.app import pages

            pages.write(html, [(done.path.name, looked[0])], given, force=force)
    if done is not None:
        show(converted_data(done) if json else converted_view(done))


@command("Example: surgeon fit model.octave.pt --reference model.pt --data photos/   writes model.octave.fit.pt")
@about_models
@about_images
def fit(
    model: Model,
    reference: Annotated[
        str,
        typer.Option("--reference", metavar="MODEL", help="The model that it was converted from.", show_default=False),
    ],
    given: "Given",
    images: "Images | None",
    distil: Distil = 0,
    state: State = None,
    cache: Kept = None,
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fit a converted model to its original, on images without labels. The result is saved.

    Every HetConv and OctaveConv gets the taps whose output is nearest to the conv's, by least squares, in order; then
    the layers behind them. Under torchrun every process takes its share of the images.
    """
    if images is None:
        raise typer.BadParameter("--data is missing: name images to fit to, for example --data photos/")
    with bar() as progress:
        from surgeon.app import commands
        from surgeon.display.fit import fit_data, fit_view
        from surgeon.fitting.fit import How
        from surgeon.fitting.fitted import Settings

        settings = Settings(How(seed=given.seed), distil, state, cache)
        made = commands.fit(model, reference, images, given, progress, settings=settings, output=output, force=force)
    if made is not None:
        show(fit_data(*made) if json else fit_view(*made))


@command("Example: surgeon fuse model.acnet.pt   writes model.acnet.fused.pt")
@about_models
def fuse(
    model: Model,
    given: "Given",
    dense: Annotated[
        bool, typer.Option("--dense", help="Fold blocks that cost less than one conv (HetConv) into one all the same.")
    ] = False,
    keep_norms: Annotated[
        bool,
        typer.Option(
            "--keep-norms",
            help="Make every block the conv and the norm again that it was made of: the weights load into the class "
            "that the model had before, and training can go on.",
        ),
    ] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="Fold surgeon's own blocks alone: the default.")] = False,
    branches: Annotated[
        bool,
        typer.Option(
            "--branches",
            help="Also make one conv of whatever is linear between a map and a later sum: the branches of RepVGG, "
            "MobileOne, DBB and their like, whoever wrote them.",
        ),
    ] = False,
    norms: Annotated[
        bool, typer.Option("--norms", help="Also fold every norm into the conv or linear layer that it belongs to.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of these.")] = False,
    size: DynamicSize = False,
    opset: Opset = None,
    half: Annotated[bool, typer.Option("--half", help="Cast the result to float16; folded in float64 first.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Cast the result to bfloat16; folded in float64 first.")] = False,
    tuned: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Deploy each block in the form that is fastest for this --input on this --device; all are exact.",
        ),
    ] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="For --tune: in this memory format.")] = False,
    python: Python = None,
    output: Output = None,
    force: Force = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Fold every block into one plain conv, or a few that cost less. The result is saved.

    Inside modules that fold themselves (RepVGG, MobileOne), blocks become a conv and a norm, as with --keep-norms;
    --branches folds these, too.

    With -o model.onnx or -o model.pt2 the result is exported: the file is run, and compared with the network, before
    it takes its place.
    """
    if blocks and (branches or norms or everything):
        raise typer.BadParameter("--blocks means blocks alone: take it, or the others, away")
    cast = one_dtype(half=half, bf16=bf16)
    if python is not None and output is not None:
        raise typer.BadParameter("--python and -o both say what to write: take one away")
    if channels_last and not tuned:
        raise typer.BadParameter("--channels-last says how to measure with --tune: add that, or take it away")
    with bar() as progress:
        import torch

        from surgeon.app import commands, outputs
        from surgeon.display.convert import fused_data, fused_view
        from surgeon.surgery.export import Form
        from surgeon.surgery.further import Further
        from surgeon.surgery.tune import Tuning

        outputs.claim_page(html, given, model, output, force=force)
        dtype = None if cast is None else getattr(torch, cast)
        how: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "dtype": dtype, "form": Form(size, opset)}
        how["tuning"] = Tuning(given.device, channels_last) if tuned else None
        further = Further(branches=branches or everything, norms=norms or everything, costlier=dense)
        looked: list[Any] = []
        how |= {"output": output, "python": python, "force": force, "look": looked.append}
        done = commands.fuse(model, given, progress, **how, further=further)
        if html is not None:
            from surgeon.app import pages

            pages.write(html, [(done.path.name, looked[0])], given, force=force)
    show(fused_data(done) if json else fused_view(done))
