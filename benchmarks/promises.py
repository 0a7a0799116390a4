"""Do the blocks that save multiply-adds save time on a device? Measures, and writes the rows that plans quote.

A network and what a recipe makes of it, both as they are deployed, take turns at each batch: eager, and on CUDA also in
a CUDA graph; with `--compile` also compiled, and with `--train` a training step under autocast.

    python benchmarks/promises.py --device cuda --half --compile --train --write
    python benchmarks/promises.py --size 64 --batch 1 --rounds 3 --recipe hetconv-p4     # how it works, on any machine
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator

import torch

import surgeon
from surgeon.analysis import example as examples
from surgeon.files import load
from surgeon.files.architectures import Architecture
from surgeon.files.pickles import Trust
from surgeon.models import devices
from surgeon.surgery import bench, promises
from surgeon.surgery.promises import Measured, Way
from surgeon.surgery.trials import Half, Setting, Trials

OPTIONS = {"octave": "alpha", "hetconv": "p"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--recipe", nargs="+", default=["octave", "hetconv-p4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--half", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--train", action="store_true", help="a training step as well, under autocast with --half")
    parser.add_argument("--write", action="store_true", help=f"update {promises.TABLE.name}")
    given = parser.parse_args()
    place = devices.named(given.device)
    rows = [row for recipe in given.recipe for row in measured(given, recipe, place)]
    for row in rows:
        ways = f"{row.way}{', training' * row.train}"
        print(f"{row.block} ({row.options}) on {row.name}, {row.dtype}, batch {row.batch}, {ways}: {row.speed:.3f}")
    if given.write:
        promises.TABLE.write_text(promises.written(promises.updated(promises.table(), rows)), encoding="utf-8")


def measured(given: argparse.Namespace, recipe: str, place: torch.device) -> Iterator[Measured]:
    """Convert the network, and time both in every setting."""
    model = load.build(Architecture(given.network), trust=Trust(), seed=0).eval()
    shape = (1, 3, given.size, given.size)
    plan = surgeon.plan(model, recipe, shape)
    block, options = next((str(entry.swap), entry.options) for entry in plan.swaps)
    shown = OPTIONS.get(block, "")
    models = [("original", model), (block, surgeon.convert(model, plan))]
    models = [(label, devices.moved(one, place)) for label, one in models]
    for setting in settings(given, place):
        timings = bench.run(models, examples.make(shape), [setting], rounds=given.rounds)
        found = [one for one in timings if one.model == block][-1]  # folded, but in a training step
        yield Measured(
            block=block,
            options=f"{shown}: {options[shown]}" if shown in options else recipe,
            network=given.network if given.size == 224 else f"{given.network} at {given.size}",
            device=place.type,
            name=name_of(place),
            torch=torch.__version__.partition("+")[0],
            dtype=found.dtype if setting.autocast is None else f"autocast {setting.autocast}",
            batch=setting.batch,
            way=way_of(setting),
            train=setting.train,
            speed=round(1 / found.time_ratio, 3),
            surgeon=surgeon.__version__,
        )


def settings(given: argparse.Namespace, place: torch.device) -> Iterator[Setting]:
    """List the settings: channels_last alone, in which both run best."""
    half: Half | None = "bfloat16" if given.half else None
    batches, graphs = tuple(given.batch), place.type == "cuda"
    for train in (False, True)[: 1 + given.train]:
        dtype, autocast = (None, half) if train else (half, None)
        how = {"compiled": given.compiled, "train": train, "graphs": graphs}
        found = Trials(batches, channels_last=True, dtype=dtype, autocast=autocast, **how).settings
        yield from (one for one in found if one.channels_last and not (one.compiled and one.graphs))


def way_of(setting: Setting) -> Way:
    return "CUDA graph" if setting.graphs else "compiled" if setting.compiled else "eager"


def name_of(place: torch.device) -> str:
    """Name a device as plans show it."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
