"""Two ways of a small network, through files as a user would go them.

ACBlocks: convert, train, fuse, verify. Octaves: convert, and fit to images without labels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon import api as surgery
from surgeon.app import commands as pipeline
from surgeon.app import pages, pairs
from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet
from surgeon.app.given import Given
from surgeon.app.images import Images
from surgeon.errors import StoreError
from surgeon.figures import kernels as figures
from surgeon.figures.kernels import KernelFigures
from surgeon.files.atomic import write_atomically
from surgeon.models.cost import measure
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import random_states_kept
from surgeon.proof.report import Report

_BATCH = 50
_RATE = 0.0005
_INPUT = "1,1,28,28"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The network after one step: its accuracy on the test images, and its cost."""

    name: str
    file: str
    accuracy: float
    params: int
    macs: int


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did: the network after every step of both ways, and of the first way the proof and the kernels."""

    steps: tuple[Snapshot, ...]
    octave: tuple[Snapshot, ...]
    report: Report  # of the folded network against the trained one
    kernels: KernelFigures  # of the first network and the folded one
    images: tuple[int, int]  # to train on, to test on
    seconds: float  # of training
    page: str | None = None  # the file that shows it all, where the files are kept


def demo(progress: Progress = silent, *, seconds: float, folder: Path | None, seed: int) -> Demo:
    """Convert, train, fold and verify the small network that ships with surgeon; and convert and fit it."""
    images = data.images()
    given = Given(inputs=(_INPUT,), seed=seed)
    made = nullcontext(folder) if folder else tempfile.TemporaryDirectory()
    with random_states_kept(seed), made as place:
        home = _made(Path(place))
        surgery.save(_trained_net(), home / "net.pt")
        start = _snapshot("trained network", home / "net.pt", images)
        steps, report = _as_acblocks(home / "net.pt", images, seconds, given, parts(progress, 0, 0.6))
        octave = _as_octaves(home / "net.pt", images, given, parts(progress, 0.6, 0.95))
        seen = figures.kernels(
            {name: surgery.load(home / name) for name in (start.file, steps[-1].file)}, control=False
        )
        page = _page(home, [steps[-2].file, steps[-1].file], report, given) if folder else None
    counts = (len(images.train_y), len(images.test_y))
    return Demo((start, *steps), (start, *octave), report, seen, counts, seconds, page)


def _as_acblocks(
    start: Path, images: data.Images, seconds: float, given: Given, progress: Progress
) -> tuple[list[Snapshot], Report]:
    """Convert without changing the function, train, fold, and prove the folded network."""
    converted = _converted(start, "acnet", given, parts(progress, 0, 0.1))
    trained = converted.with_name("net.acnet.trained.pt")
    steps = [_snapshot("converted to ACBlocks", converted, images)]
    model = surgery.load(converted)
    train_(model, images, seconds, parts(progress, 0.1, 0.8))
    surgery.save(model, trained)
    steps.append(_snapshot(f"trained {seconds:g} s more", trained, images))
    fused = pipeline.fuse(str(trained), given, parts(progress, 0.8, 0.9), output=None, force=False).path
    steps.append(_snapshot("folded back", fused, images))
    return steps, pairs.verify(str(trained), str(fused), given, parts(progress, 0.9, 1))


def _page(home: Path, files: Sequence[str], report: Report, given: Given) -> str:
    """Show the trained network and the folded one on a page beside them."""
    path = home / "report.html"
    models = [(name, surgery.load(home / name)) for name in files]
    pages.write(path, models, given, report=report, force=True, title="The demo of surgeon")
    return str(path)


def _converted(start: Path, recipe: str, given: Given, progress: Progress) -> Path:
    """Convert, and say where the result is."""
    done = pipeline.convert(str(start), recipe, given, progress, output=None, force=False)
    assert done is not None  # there is one process
    return done.path


def _as_octaves(start: Path, images: data.Images, given: Given, progress: Progress) -> list[Snapshot]:
    """Convert to blocks that cost less and compute something else, and fit them; labels are not used."""
    source = start.with_name("net.images.safetensors")
    write_atomically(source, lambda part: save_file({"images": images.train_x}, part), force=True)
    converted = _converted(start, "octave", given, parts(progress, 0, 0.3))
    steps = [_snapshot("converted to octaves", converted, images)]
    shown = parts(progress, 0.3, 1)
    fitted = pipeline.fit(str(converted), str(start), Images(str(source)), given, shown)
    return steps if fitted is None else [*steps, _snapshot("fitted", fitted[1], images)]


def _snapshot(name: str, path: Path, images: data.Images) -> Snapshot:
    """Test the network that a file holds."""
    model = surgery.load(path)
    cost = measure(model, [images.test_x[:1]])
    assert cost.macs is not None
    return Snapshot(name, path.name, accuracy(model, images.test_x, images.test_y), cost.params, cost.macs)


def _made(home: Path) -> Path:
    """Make the folder that the models go into; one that holds models already is left alone."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        taken = sorted([*home.glob("net.*"), *home.glob("report.html")])
    except OSError as error:
        raise StoreError(f"cannot make the folder {home}: {error.strerror}", todo="Name another one.") from error
    if taken:
        raise StoreError(f"{taken[0]} exists", todo="Name another folder, or remove it first.")
    return home


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Give the share of images (n, 1, 28, 28) that a model classifies correctly."""
    with torch.no_grad():
        right: Tensor = model.eval()(x).argmax(1) == y
    return right.double().mean().item()


def train_(model: nn.Module, images: data.Images, seconds: float, progress: Progress = silent) -> None:
    """Train for some seconds on the shipped images, like any other network."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=1e-4)
    start = time.monotonic()
    model.train()
    progress("training", 0)
    while (spent := time.monotonic() - start) < seconds:
        picked = torch.randperm(len(images.train_y))[:_BATCH]
        loss = F.cross_entropy(model(_shifted(images.train_x[picked])), images.train_y[picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(f"training, loss {loss.item():.3f}", spent / seconds)


def _shifted(x: Tensor) -> Tensor:
    """Move a batch by up to two pixels, and mirror it now and then."""
    down, right, mirror = (int(n) for n in torch.randint(0, 5, (3,)))
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[..., down : down + 28, right : right + 28]
    return x.flip(-1) if mirror < 2 else x


def _trained_net() -> nn.Module:
    net = SmallResNet()
    net.load_state_dict(data.weights())
    return net
