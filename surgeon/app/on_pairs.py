"""The command that compares two models. torch is imported only when needed."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="A=B",
        help="A module of A and the one of B that belongs to it though its name differs, with all that lies in them: "
        "features.0=stem. May be repeated; modules with the same tensors are found without.",
    ),
]
Bisect = Annotated[
    bool,
    typer.Option("--bisect", help="If they differ, find the smallest set of modules that explains it, by halving."),
]

Prove = Annotated[
    bool,
    typer.Option(
        "--prove",
        help="Also compare what was folded without running inputs: for every input of every size. Takes several times "
        "as long.",
    ),
]
SaveOutputs = Annotated[
    Path | None,
    typer.Option(
        "--save-outputs",
        metavar="FILE",
        help="Without B: write what A gives to a .safetensors file, for --against where A is not at hand.",
    ),
]
Against = Annotated[
    Path | None,
    typer.Option("--against", metavar="FILE", help="Without B: compare this model with the outputs in such a file."),
]
Sites = Annotated[
    bool, typer.Option("--sites", help="With --save-outputs: keep what every module gives, too, as sketches.")
]
StoreInputs = Annotated[
    bool,
    typer.Option("--store-inputs", help="With --save-outputs: keep random inputs instead of drawing them again."),
]


def _check_sides(b: str | None, saved: Path | None, against: Path | None, given: dict[str, object]) -> None:
    """Refuse what does not go together: there are two models, or one and a file of outputs."""
    if sum(side is not None for side in (b, saved, against)) != 1:
        raise typer.BadParameter("give a second model B, or --save-outputs FILE, or --against FILE: one of the three")
    only_saving = ("--sites", "--store-inputs")
    only_pairs = ("--map", "--bisect", "--mode", "--gradients", "--prove")
    wrong = {
        "a second model": only_saving,
        "--save-outputs": ("--data", "--junit", "--markdown", "--html", *only_pairs),
        "--against": ("--data", "--html", "--input", *only_pairs, *only_saving),
    }
    side = "a second model" if b is not None else "--save-outputs" if saved is not None else "--against"
    for name in wrong[side]:
        if given[name]:
            raise typer.BadParameter(f"{name} does not go with {side}: take one away")


@command("Example: surgeon verify model.acnet.pt model.acnet.fused.pt   exits 0 if they are equivalent")
@about_models
@about_images
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference model.", show_default=False)],
    given: "Given",
    images: "Images | None",
    b: Annotated[
        str | None, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)
    ] = None,
    html: Html = None,
    mode: Annotated[
        Literal["eval", "train"],
        typer.Option(help="train: also compare a step in train mode, and the statistics of norms behind it."),
    ] = "eval",
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also compare the gradients of inputs and of shared parameters.")
    ] = False,
    prove: Prove = False,
    json: Json = False,
    schema: Schema = False,
    junit: JUnit = None,
    markdown: Markdown = None,
    save_outputs: SaveOutputs = None,
    sites: Sites = False,
    store_inputs: StoreInputs = False,
    against: Against = None,
    force: Force = False,
    map_: Map = None,
    bisect: Bisect = False,
) -> None:
    """Say whether B computes what A does, and where they diverge. Distances are shown as well.

    With --data, both are also run on images: how often they agree, and with --labels how right each of them is. Under
    torchrun every process takes its share of the images.

    Where A and B cannot be in one place: `verify A --save-outputs FILE` there, and `verify B --against FILE` here.

    Exit code: 0 equivalent, 1 different, 2 could not be compared, 3 approximate by design.
    """
    asked: dict[str, object] = {"--data": images, "--input": given.inputs, "--junit": junit, "--markdown": markdown}
    asked |= {"--html": html, "--map": map_, "--bisect": bisect, "--mode": mode == "train", "--gradients": gradients}
    asked["--prove"] = prove
    _check_sides(b, save_outputs, against, asked | {"--sites": sites, "--store-inputs": store_inputs})
    if json and markdown == "-":
        raise typer.BadParameter("--json and --markdown - both print: give --markdown a file, or take one away")
    if save_outputs is not None:
        _save(a, save_outputs, given, json=json, sites=sites, store_inputs=store_inputs, force=force)
        return
    with bar() as progress:
        from surgeon.app import outputs, pairs
        from surgeon.app.reports import Reports
        from surgeon.display.report import report_view
        from surgeon.proof import matching

        reports = Reports(junit, markdown, force)
        reports.claim(pairs.read_for(a, b or against, given, images))
        outputs.claim_page(html, given, a, b, force=force)
        more: dict[str, Any] = {"names": dict(matching.pairs_in(map_ or ())), "bisect": bisect}
        more |= {"mode": mode, "gradients": gradients, "prove": prove}
        found = pairs.judge(a, b or against, given, progress, images, **more)
        if html is not None and found is not None and b is not None:
            from surgeon.app import pages

            pages.of_files(html, [a, b], given, force=force, report=found)
    if found is None:  # another process says it
        return
    reports.write(found, *((a, b) if b is not None else (str(against), a)))
    if not reports.is_on_screen:
        show(found.to_dict() if json else report_view(found))
    raise typer.Exit({"equivalent": 0, "different": 1, "approximate": 3}[found.verdict])


def _save(a: str, path: Path, given: "Given", *, json: bool, sites: bool, store_inputs: bool, force: bool) -> None:
    """Keep what A gives in a file, and say so."""
    with bar() as progress:
        from surgeon.app import pairs

        pairs.save_outputs(a, path, given, progress, sites=sites, store_inputs=store_inputs, force=force)
    if json:
        show({"path": str(path)})
        return
    show(f"written: {path}; where B is, compare it:")
    show(f"  surgeon verify B --against {shlex.quote(path.name)}")
