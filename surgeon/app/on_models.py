"""The commands that read models. torch is imported only when needed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.app.options import (
    Autocast,
    Bake,
    CompileMode,
    Distil,
    DynamicSize,
    Force,
    Graphs,
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
        from surgeon.app import commands
        from surgeon.display.convert import converted_data, converted_view
        from surgeon.fitting.fit import How
        from surgeon.fitting.fitted import Settings
        from surgeon.surgery import plan as plans

        how = plans.read(plan) if plan is not None else str(recipe)
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
        )
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

        from surgeon.app import commands
        from surgeon.display.convert import fused_data, fused_view
        from surgeon.surgery.export import Form
        from surgeon.surgery.further import Further
        from surgeon.surgery.tune import Tuning

        dtype = None if cast is None else getattr(torch, cast)
        how: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "dtype": dtype, "form": Form(size, opset)}
        how["tuning"] = Tuning(given.device, channels_last) if tuned else None
        further = Further(branches=branches or everything, norms=norms or everything, costlier=dense)
        done = commands.fuse(model, given, progress, **how, further=further, output=output, python=python, force=force)
    show(fused_data(done) if json else fused_view(done))


@command("Example: surgeon verify model.acnet.pt model.acnet.fused.pt   exits 0 if they are equivalent")
@about_models
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference model.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)],
    given: "Given",
    json: Json = False,
) -> None:
    """Say whether B computes what A does, and where they diverge. Distances are shown as well.

    Exit code: 0 equivalent, 1 different, 2 could not be compared, 3 approximate by design.
    """
    with bar() as progress:
        from surgeon.app import commands
        from surgeon.display.report import report_view

        found = commands.verify(a, b, given, progress)
    show(found.to_dict() if json else report_view(found))
    raise typer.Exit({"equivalent": 0, "different": 1, "approximate": 3}[found.verdict])


@command("Example: surgeon survey torchvision:resnet50")
@about_models
def survey(
    model: Model,
    given: "Given",
    json: Json = False,
) -> None:
    """List every conv of a model, and why it cannot be swapped.

    Shown are names, geometry, sizes, calls, and what reads its output.
    """
    with bar() as progress:
        from surgeon.app import commands
        from surgeon.display.survey import survey_data, survey_view

        found = commands.survey(model, given, progress)
    show(survey_data(found) if json else survey_view(found))


@command("Example: surgeon plan model.pt --recipe acnet -o plan.yaml   then edit it, and convert --plan plan.yaml")
@about_models
@about_images
def plan(
    model: Model,
    given: "Given",
    images: "Images | None",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe: a file, or the name of a bundled one.")],
    sets: Sets = None,
    bake: Bake = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the plan as .yaml or .json, to edit and apply."),
    ] = None,
    force: Force = False,
    time: Time = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="macs=X|error=X", help="Swap the convs that lose least until the network costs ×X."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw cost against error: what was chosen, and what else.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a recipe would do to every conv of a model. Nothing is changed.

    With --data, every conv is fitted to these images alone, and the plan says what it would lose beside what it saves.
    --budget then chooses which convs are swapped, and with which options; convert --plan --data carries that out.
    """
    if images is not None and images.labels:
        raise typer.BadParameter("--labels measure accuracy, and a plan has none: give them to fit or convert")
    if images is None and (budget or picture):
        raise typer.BadParameter("--budget and --picture need images to measure with: give --data SOURCE")
    if images is not None and time:
        raise typer.BadParameter("give either --data or --time; convert --plan takes --time as well")
    with bar() as progress:
        from surgeon.app import commands, outputs
        from surgeon.display.plan import plan_view

        if output is not None:
            outputs.claim_plan(output, model, recipe, given, force=force)
        if picture is not None:
            outputs.claim_picture(picture, model, given, force=force)
        decided = commands.plan(
            model,
            recipe,
            given,
            progress,
            overrides=sets or (),
            bake=bake,
            time=time,
            images=images,
            budget=budget,
            picture=picture,
        )
        if output is not None:
            outputs.write_plan(decided, output, force=force)
            if json:
                _log.info(f"written: {output}")
    if json:
        show(decided.to_dict())
    else:
        show(plan_view(decided, every_conv=output is None, written=output))


@command("Example: surgeon bench model.pt model.hetconv-p4.pt --batch 8 --channels-last")
@about_models
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A [B …]", help="The models; ratios are to the first one.", show_default=False),
    ],
    given: "Given",
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-b", min=1, help="Images in a run; may be repeated.  [default: 1]")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", "-t", min=1, help="Threads of torch; may be repeated.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=3, help="How many rounds to measure; each one times every model once.")
    ] = 15,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Also measure in this memory format.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also measure with torch.compile.")] = False,
    mode: CompileMode = None,
    graphs: Graphs = False,
    train: Annotated[bool, typer.Option("--train", help="Time a training step: forward and backward.")] = False,
    autocast: Autocast = None,
    half: Annotated[bool, typer.Option("--half", help="Cast the models to float16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Cast the models to bfloat16.")] = False,
    json: Json = False,
) -> None:
    """Time models against each other in one run. They take turns, as they are and with their norms folded.

    On a GPU (--device cuda) the device's own events tell the time: from the first launch to the end of the last kernel.
    """
    dtype = one_dtype(half=half, bf16=bf16)
    with bar() as progress:
        from surgeon.app import commands
        from surgeon.display.bench import bench_data, bench_view
        from surgeon.surgery.trials import Trials

        how: dict[str, Any] = {"modes": (mode,) * (mode is not None), "graphs": graphs, "dtype": dtype}
        how["autocast"] = {"fp16": "float16", "bf16": "bfloat16", None: None}[autocast]
        if compiled and mode is not None:
            how["modes"] = tuple(dict.fromkeys(("default", mode)))
        trials = Trials(tuple(batch or (1,)), tuple(threads or ()), rounds, channels_last, compiled, train, **how)
        timings = commands.bench(models, given, trials, progress)
    show(bench_data(timings) if json else bench_view(timings))
