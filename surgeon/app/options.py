"""The options that several commands share, and how those that say how a model is read become one argument."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file (model.pt, x.safetensors), torchvision:resnet50, timm:repvgg_a0, pkg.mod:factory or file.py:Net.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(help="The network that a file of weights belongs to: torchvision:resnet50, or a model file like it."),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", metavar="NAME=VALUE", help="An argument for building the network; may be repeated."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="KEY", help="Which weights of a checkpoint to take: a key (ema), or a prefix (student)."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="PACKAGE",
        help="Let a pickled model name modules of this package; may be repeated. Otherwise SURGEON_ALLOW counts, or "
        "`allow` of [tool.surgeon] in pyproject.toml.",
    ),
]
Unsafe = Annotated[
    bool, typer.Option("--unsafe-pickle", help="Unpickle without limits: this RUNS what is in the file.")
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="EXAMPLE",
        help="An example input: a shape (1,3,224,224; 1,10:int64), several (1,3,8,8;1,10:int64), by name "
        "(image=1,3,8,8;mask=1,8,8:bool), a list ([3,300,300;3,280,320]), a .pt, .safetensors, .npz or image file, "
        "or file.py:make_inputs. verify takes the option several times.",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The seed of random inputs and of random initial weights.")
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",  # typer 0.27 takes the metavar for the name otherwise
        metavar="DEVICE",
        help="Where to run models: cpu, cuda, cuda:1 or mps. Files are for every device. Otherwise SURGEON_DEVICE "
        "counts, or `device` of [tool.surgeon] in pyproject.toml, or cpu.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE.html", help="Also write a page to look at: one file that loads nothing."),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output if it exists.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write; .safetensors writes weights and a manifest."),
]
DynamicSize = Annotated[
    bool, typer.Option("--dynamic-size", help="For .onnx and .pt2: let height and width vary, as the batch does.")
]
Opset = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="For .onnx: the version of its operators; 20 if left out.")
]
Python = Annotated[
    Path | None,
    typer.Option(
        "--python",
        metavar="FOLDER",
        help="Write it as Python of plain torch instead: model.py and model.safetensors, which need no surgeon.",
    ),
]
Bake = Annotated[
    bool,
    typer.Option(
        "--bake",
        help="Make the tensors that weight norm, spectral norm or pruning compute permanent, as they are in eval mode, "
        "in convs that are swapped.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value of the recipe: rules[0].with.init=split."),
]
Time = Annotated[
    bool,
    typer.Option("--time", help="Also measure how long the network takes, as it is and converted, both of them fused."),
]
Distil = Annotated[
    int, typer.Option(min=0, help="Then train the network for so many steps against the original's outputs; no labels.")
]
State = Annotated[
    Path | None,
    typer.Option(
        "--resume", metavar="FILE", help="Note in this file how far fitting is, and go on from there if it was ended."
    ),
]

Kept = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="FOLDER", help="Keep here what depends on the original and the images alone, for next time."
    ),
]
CompileMode = Annotated[
    Literal["default", "reduce-overhead", "max-autotune"] | None,
    typer.Option("--compile-mode", help="Also measure with torch.compile in this mode."),
]
Graphs = Annotated[
    bool,
    typer.Option("--graphs", help="Also measure captured in a CUDA graph: kernels, without the time to launch them."),
]
Autocast = Annotated[
    Literal["bf16", "fp16"] | None,
    typer.Option("--autocast", help="Run under torch.autocast with this dtype, as training usually does."),
]


def one_dtype(*, half: bool, bf16: bool) -> Literal["float16", "bfloat16"] | None:
    """Give the name of the smaller dtype that is asked for."""
    if half and bf16:
        raise typer.BadParameter("--half and --bf16 are two dtypes: take one away")
    return "float16" if half else "bfloat16" if bf16 else None


def about_images(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which images to fit to; it receives them as its argument `images`.

    Where `--data` may be left out, it receives None without it.
    """

    def run(
        data: Annotated[
            str | None,
            typer.Option(
                metavar="SOURCE",
                help="Images without labels: a folder, .npz, .npy, .safetensors, .pt, file.py:loader, or noise.",
            ),
        ] = None,
        images: Annotated[int | None, typer.Option(min=1, help="Take so many of them, drawn by --seed.")] = None,
        batch: Annotated[int | None, typer.Option(min=1, help="Run so many at once; 64 if left out.")] = None,
        preprocess: Annotated[
            str | None,
            typer.Option(
                metavar="HOW",
                help='imagenet, none, or "size=64,mean=0.29,std=0.35"; otherwise as the model\'s library says.',
            ),
        ] = None,
        labels: Annotated[
            str | None,
            typer.Option(metavar="FILE", help="Their classes, to measure accuracy: a file of whole numbers, or own."),
        ] = None,
        **rest: Any,
    ) -> None:
        if data is None:
            if images or batch or preprocess or labels:
                raise typer.BadParameter(
                    "--images, --batch, --preprocess and --labels say what to do with --data SOURCE"
                )
            command(images=None, **rest)
            return
        from surgeon.app.images import Images

        command(images=Images(data, images, batch, preprocess, labels), **rest)

    return _merged(command, run, "images")


def about_models(command: Callable[..., None], *, only_with: str | None = None) -> Callable[..., None]:
    """Give a command the options that say how models are read; it receives them as its argument `given`.

    A command that only reads a model where its option `only_with` names one receives None without it.
    """

    def run(
        arch: Arch = None,
        arch_arg: ArchArg = None,
        weights: Weights = None,
        allow: Allow = None,
        unsafe: Unsafe = False,
        shape: Input = None,
        seed: Seed = 0,
        device: Device = None,
        **rest: Any,
    ) -> None:
        from surgeon.app import settings
        from surgeon.app.given import Given
        from surgeon.files.pickles import Trust
        from surgeon.models import devices

        if only_with is not None and rest[only_with] is None:
            if arch or arch_arg or weights or allow or unsafe or shape or seed or device:
                raise typer.BadParameter("--input, --arch and their like say how a model is read; name it with --for")
            command(given=None, **rest)
            return
        if len(shape or ()) > 1 and command.__name__ != "verify":
            raise typer.BadParameter(
                "--input is given twice; only verify takes several. Arguments of one call go together: --input 'a;b'"
            )
        trust = Trust(allow=settings.allowed(allow), unsafe_pickle=unsafe)
        place = devices.named(settings.device(device))
        command(
            given=Given(arch, tuple(arch_arg or ()), trust, tuple(shape or ()), seed, place, weights),
            **rest,
        )

    return _merged(command, run, "given")


def _merged(command: Callable[..., None], run: Callable[..., None], made: str) -> Callable[..., None]:
    """Let `run` show the options of a command beside its own, but for the argument that it makes."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != made]
    shared = [p for p in inspect.signature(run).parameters.values() if p.name != "rest"]
    parameters = sorted(
        (p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)), key=lambda p: p.default is not p.empty
    )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
