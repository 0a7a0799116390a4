"""The commands that look at models. torch is imported only when needed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.app.options import (
    Autocast,
    Bake,
    CompileMode,
    Force,
    Graphs,
    Html,
    Json,
    Model,
    Sets,
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
    html: Html = None,
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
        outputs.claim_page(html, given, model, recipe, output, force=force)
        looked: list[Any] = []
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
            look=looked.append,
        )
        if html is not None:
            from surgeon.app import pages

            pages.of_plan(html, model, looked, decided, given, force=force)
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
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Time models against each other in one run. They take turns, as they are and with their norms folded.

    On a GPU (--device cuda) the device's own events tell the time: from the first launch to the end of the last kernel.
    """
    dtype = one_dtype(half=half, bf16=bf16)
    with bar() as progress:
        from surgeon.app import commands, outputs
        from surgeon.display.bench import bench_data, bench_view
        from surgeon.surgery.trials import Trials

        how: dict[str, Any] = {"modes": (mode,) * (mode is not None), "graphs": graphs, "dtype": dtype}
        how["autocast"] = {"fp16": "float16", "bf16": "bfloat16", None: None}[autocast]
        if compiled and mode is not None:
            how["modes"] = tuple(dict.fromkeys(("default", mode)))
        trials = Trials(tuple(batch or (1,)), tuple(threads or ()), rounds, channels_last, compiled, train, **how)
        outputs.claim_page(html, given, *models, force=force)
        timings = commands.bench(models, given, trials, progress)
        if html is not None:
            from surgeon.app import pages

            pages.of_files(html, models, given, force=force, timings=timings)
    show(bench_data(timings) if json else bench_view(timings))
