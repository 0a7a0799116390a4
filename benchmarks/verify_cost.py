"""What does verify cost, beside running the two models that it compares?

Time: two forward passes of A and B in their own dtype, the same in float64, and `surgeon.verify`, taking turns in one
process; medians, and the ratio within every round. Memory: loading both and verifying them, against loading both,
casting them to float64 and running each once, every way in a process of its own; its peak resident memory is given
without that of a process that only imports the same.

The pairs: an ACNet and what it folds to, an octave network and its deployed form, both with their history; and without
one, a network whose norms torch.fx has folded, and a plain copy.

    python benchmarks/verify_cost.py --networks resnet18 resnet50 --rounds 3
    python benchmarks/verify_cost.py --pairs acnet --passes      # and how many passes verify makes of which model
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from scaling import peak
from torch import Tensor, nn
from torch.fx.experimental import optimization

import surgeon
from surgeon.models.call import Inputs
from surgeon.proof.held import Held

PAIRS = ("acnet", "octave", "fx", "copy")
WAYS = {
    "imports": "",
    "loaded": "pair()",
    "with two float64 copies, run": (
        "held = pair()\nwide = [copy.deepcopy(one).double() for one in held]\n[one(x.double()) for one in wide]"
    ),
    "verify": "surgeon.verify(*pair(), x)",
}
SCRIPT = """
import copy, sys
sys.path.insert(0, {folder!r})
import torch, torchvision, surgeon, surgeon.api, verify_cost
torch.set_grad_enabled(False)
torch.set_num_threads(1)
x = torch.randn(*{shape}, generator=torch.Generator().manual_seed(1))
def pair(): return verify_cost.opened({files!r})
{way}
"""


def trained(name: str) -> nn.Module:
    """Build a network whose norms have statistics, as training gives them."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def made(name: str, kind: str, example: Tensor) -> tuple[nn.Module, nn.Module]:
    """Make a pair of models that compute the same."""
    net = trained(name)
    if kind == "fx":
        return net, optimization.fuse(net)
    if kind == "copy":
        return net, copy.deepcopy(net)
    converted = surgeon.convert(net, kind, example)
    return converted, surgeon.fuse(converted, example)


def opened(files: tuple[str, str]) -> list[nn.Module]:
    """Open a pair; torch's own fused module is no file that surgeon writes, so it is made again."""
    a = surgeon.load(files[0]).eval()
    return [a, optimization.fuse(a) if files[1] == "fx" else surgeon.load(files[1]).eval()]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show_time(name: str, kind: str, x: Tensor, rounds: int) -> None:
    a, b = made(name, kind, x[:1])
    wide = [copy.deepcopy(one).double() for one in (a, b)]
    ways: list[Callable[[], object]] = [
        lambda: [one(x) for one in (a, b)],
        lambda: [one(x.double()) for one in wide],
        lambda: surgeon.verify(a, b, x),
    ]
    ways[0]()
    took = [[seconds(way) for way in ways] for _ in range(rounds)]
    own, double, verify = (statistics.median(one[i] for one in took) for i in range(3))
    of_own, of_double = ([one[2] / one[i] for one in took] for i in (0, 1))
    span = f"{min(of_own):.2f} … {max(of_own):.2f}"
    print(
        f"| {name}, {kind} | {own:.2f} | {double:.2f} | {verify:.2f} | **{statistics.median(of_own):.2f}** ({span}) "
        f"| {statistics.median(of_double):.2f} |",
        flush=True,
    )


def show_memory(name: str, kind: str, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{side}.pt") for side in "ab"]
        make = f"import verify_cost; verify_cost.write_({name!r}, {kind!r}, {files!r}, {tuple(x.shape)!r})"
        here = str(Path(__file__).resolve().parent)
        subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); {make}"], check=True)
        files = [files[0], "fx" if kind == "fx" else files[1]]
        how = {"folder": here, "shape": tuple(x.shape), "files": files}
        peaks = {name: peak(sys.executable, "-c", SCRIPT.format(way=way, **how)) for name, way in WAYS.items()}
    more = [(one - peaks["imports"]) / 1e6 for one in peaks.values()]
    print(f"| {name}, {kind} | " + " | ".join(f"{one:.0f}" for one in more[1:]) + f" | **{more[3] / more[2]:.2f}** |")


def write_(name: str, kind: str, files: list[str], shape: tuple[int, ...]) -> None:
    """Write a pair into files."""
    a, b = made(name, kind, torch.randn(1, *shape[1:]))
    surgeon.save(a, files[0])
    if kind != "fx":
        surgeon.save(b, files[1])


def show_passes(name: str, kind: str, x: Tensor) -> None:
    """Say how many images verify leads through which model, in which dtype, beside those of the input."""
    a, b = made(name, kind, x[:1])
    counted: Counter[str] = Counter()
    call = Held.call

    def counting(self: Held, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> object:
        sides = ("own_a", "own_b", "a", "b", "replay", "twin")
        side = next((side for side in sides if getattr(self, side) is model), "moved")
        counted[f"{side} {str(dtype).removeprefix('torch.')}"] += inputs.numel / x.numel()  # type: ignore[assignment]
        return call(self, model, inputs, dtype)

    Held.call = counting  # type: ignore[method-assign]
    try:
        surgeon.verify(a, b, x)
    finally:
        Held.call = call  # type: ignore[method-assign]
    print(f"{name}, {kind}: " + ", ".join(f"{side} {count:.2f}" for side, count in counted.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--passes", action="store_true", help="count the passes, and measure nothing else")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    x = torch.randn(given.batch, 3, given.size, given.size, generator=torch.Generator().manual_seed(1))
    every = [(name, kind) for name in given.networks for kind in given.pairs]
    if given.passes:
        for one in every:
            show_passes(*one, x)
        return
    if given.rounds:
        print("| pair | two passes, s | in float64, s | verify, s | × two passes | × those in float64 |")
        print("|---|---|---|---|---|---|")
        for one in every:
            show_time(*one, x, given.rounds)
    if not given.no_memory:
        print("\n| pair | " + " | ".join(f"{name}, MB" for name in list(WAYS)[1:]) + " | × two copies |")
        print("|---" * (len(WAYS) + 1) + "|")
        for one in every:
            show_memory(*one, x)


if __name__ == "__main__":
    main()
