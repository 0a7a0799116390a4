"""What fitting takes: seconds by the number of images, and peak memory, of a large network.

ResNet-50 with all of its 3x3 convs as HetConv (P = 4, layout best) is fitted to random images, every number of images
in a process of its own. Peak memory is the resident memory of that process without that of one which has the same
imports and the images, and beside it is what was foreseen. Time is that of the passes over the images, without what
solving takes, which does not depend on them; processor seconds, since the machine is shared.

    python benchmarks/fit_memory.py --images 32 64
    python benchmarks/fit_memory.py --network resnet18 --pixels 64 --images 256 512

A deep layer has 4,608 taps, so ResNet-50 at 224 pixels needs at least 24 images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
import torchvision

import surgeon
from surgeon.app import cli  # noqa: F401 - imports as those of a command
from surgeon.fitting import data as sources
from surgeon.fitting import fit, passes
from surgeon.fitting.foresee import foresee
from surgeon.fitting.units import units

RECIPE = {
    "surgeon": 1,
    "title": "all 3x3 convs",
    "rules": [
        {"swap": "hetconv", "match": {"kernel": 3, "in_channels": {"min": 4}}, "with": {"p": 4, "layout": "best"}}
    ],
}
WIDTHS = (6, 10, 11, 13, 7, 10, 14)
START = """
import resource, subprocess, sys
print(subprocess.run(sys.argv[1:], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


class Timed(passes.Pass):
    """Passes whose processor time is added up."""

    seconds = 0.0

    def run(self, *args: object, **kwargs: object) -> None:
        start = time.process_time()
        super().run(*args, **kwargs)  # type: ignore[arg-type]
        Timed.seconds += time.process_time() - start


def work(given: argparse.Namespace, images: int) -> None:
    """Fit, and print what it took as JSON; with no images, only have what a fit has to begin with."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(max(images, given.images[0]), 3, given.pixels, given.pixels)
    data = sources.of(x, batch=given.batch)
    if not images:
        print(json.dumps({}))
        return
    net = getattr(torchvision.models, given.network)(weights=None).eval()
    converted = surgeon.convert(net, RECIPE, example=(1, 3, given.pixels, given.pixels)).eval()
    small = next(iter(data)).inputs.batched(2)
    foreseen = foresee(units(converted, net, small, refit=True), converted, net, small.batched(1), images)
    fit.Pass = Timed  # type: ignore[misc]
    start = time.process_time()
    fit.fit_(converted, net, data)
    print(json.dumps({"all": time.process_time() - start, "passes": Timed.seconds, "foreseen": foreseen.bytes}))


def measured(images: int) -> tuple[dict[str, float], float]:
    """Start this script for so many images; what it printed, and its peak resident memory in bytes."""
    command = [sys.executable, "-c", START, sys.executable, *sys.argv, "--work", str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{images} images failed: {done.stderr}")
    told, peak = done.stdout.split("\n")[:2]
    return json.loads(told), float(peak)


def show(given: argparse.Namespace) -> None:
    bare = measured(0)[1]
    print(f"{given.network} at {given.pixels} pixels, batch {given.batch}; a bare start has {bare / 1e6:.0f} MB")
    heads = zip(
        ("images", "all, s", "passes, s", "s per image", "ratio", "peak, GB", "foreseen, GB"), WIDTHS, strict=True
    )
    print("".join(f"{head:>{width}}" for head, width in heads))
    first = 0.0
    for images in given.images:
        took, peak = measured(images)
        each = took["passes"] / images
        first = first or each
        row = f"{images:6}{took['all']:10.1f}{took['passes']:11.1f}{each:13.2f}{each / first:7.2f}"
        print(f"{row}{(peak - bare) / 1e9:10.2f}{took['foreseen'] / 1e9:14.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is None:
        show(given)
    else:
        work(given, given.work)


if __name__ == "__main__":
    main()
