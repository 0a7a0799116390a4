"""What converting a ResNet-50 file costs, against the plain floor, side by side in one run.

The floor is a script that imports torch, loads the same file, traces it and saves it. Each round runs both, one after
the other, in processes of their own; the ratios are those of the medians, with the smallest and largest pairwise ratio.

    python benchmarks/convert.py --rounds 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

FLOOR = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.fx.symbolic_trace(model)
torch.save(model, sys.argv[2])
"""
MAKE = """
import sys, torch, torchvision
torch.save(torchvision.models.resnet50(weights=None), sys.argv[1])
"""


class Spent(NamedTuple):
    seconds: float
    megabytes: float


def spent(*command: str) -> Spent:
    """Run a command; return its wall-clock time and its peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Spent(seconds, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        model, out = str(Path(folder) / "resnet50.pt"), str(Path(folder) / "out.pt")
        subprocess.run([sys.executable, "-c", MAKE, model], check=True)
        floor = (sys.executable, "-c", FLOOR, model, out)
        convert = (sys.executable, "-m", "surgeon", "convert", model, "--recipe", "acnet", "-o", out, "--force")
        for command in (floor, convert):
            spent(*command)  # warm the disk cache
        pairs = [(spent(*floor), spent(*convert)) for _ in range(rounds)]
    print(f"{'':12}{'floor':>10}{'convert':>10}{'ratio':>8}   pairwise")
    for name, unit in (("seconds", "s"), ("megabytes", "MB")):
        ours, theirs = ([getattr(pair[side], name) for pair in pairs] for side in (1, 0))
        ratios = [mine / floor for mine, floor in zip(ours, theirs, strict=True)]
        mine, plain = statistics.median(ours), statistics.median(theirs)
        label = f"{'time' if unit == 's' else 'memory'}, {unit}"
        print(f"{label:12}{plain:10.2f}{mine:10.2f}{mine / plain:8.2f}   {min(ratios):.2f} … {max(ratios):.2f}")


if __name__ == "__main__":
    main()
