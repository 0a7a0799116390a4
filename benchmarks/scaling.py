"""How conversion grows with the network: seconds by the number of convs, and peak memory of a model of a gigabyte.

Time: networks of 250 to 2,000 convs (3×3 on a small map, each with its norm, in residual blocks) are converted with
acnet and fused, taking turns in every round; it prints processor seconds, since the machine is shared, and the median
per conv.

Memory: every way of converting runs in a process of its own, in float32. Its peak resident memory, without that of a
process that has the same imports and builds no model, is given as a multiple of the size of the model.

    python benchmarks/scaling.py --rounds 3 --gigabytes 1
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import surgeon

COUNTS = (250, 500, 1000, 2000)
WIDTH = 512  # of the large model: a conv has 9.4 MB, as the largest ones of ResNets and VGGs

INPUT = (1, WIDTH, 24, 24)

WAYS = {
    "imports only": "",
    "the model alone": "model = large(); model(torch.zeros(INPUT))",
    "convert_, acnet": "surgeon.convert_(large(), 'acnet', INPUT)",
    "convert_, hetconv-p4": "surgeon.convert_(large(), 'hetconv-p4', INPUT)",
    "convert_, octave": "surgeon.convert_(large(), 'octave', INPUT)",
    "convert, acnet": "surgeon.convert(large(), 'acnet', INPUT)",
    "convert_ and fuse_, acnet": "surgeon.fuse_(surgeon.convert_(large(), 'acnet', INPUT))",
}
SCRIPT = """
import os, sys
sys.path.insert(0, {folder!r})
import torch, surgeon, surgeon.app.cli
from scaling import INPUT, sized
def large(): return sized({gigabytes})
torch.set_grad_enabled(False)
{way}
"""
START = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


class Block(nn.Module):
    """A conv with its norm beside a shortcut; the branch is weak, so that a thousand of them do not overflow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        nn.init.constant_(self.bn.weight, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)).relu()


def deep(count: int) -> nn.Module:
    """Build a network of so many convs, in stages of ten."""
    stages = [nn.Sequential(*(Block(8) for _ in range(10))) for _ in range(count // 10)]
    return nn.Sequential(*stages).eval()


def sized(gigabytes: float) -> nn.Module:
    """Build a network of that size."""
    count = round(gigabytes * 1e9 / (4 * 9 * WIDTH * WIDTH))
    return nn.Sequential(*(Block(WIDTH) for _ in range(count))).eval()


def bytes_of(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def seconds(count: int) -> tuple[float, float]:
    """Convert and fuse a network; return the processor seconds of each."""
    net, start = deep(count), time.process_time()
    surgeon.convert_(net, "acnet", (1, 8, 16, 16))
    between = time.process_time()
    surgeon.fuse_(net)
    return between - start, time.process_time() - between


def peak(*command: str) -> float:
    """Run a command; return its peak resident memory in bytes.

    A small process starts it: the peak that Linux reports begins with that of the process it was forked from.
    """
    done = subprocess.run((sys.executable, "-c", START, *command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return float(done.stdout.split()[-1])


def show_time(rounds: int) -> None:
    seconds(COUNTS[0])  # what is loaded and compiled once
    spent = [{count: seconds(count) for count in COUNTS} for _ in range(rounds)]
    print(f"{'convs':>6}{'convert, s':>12}{'ms per conv':>13}{'fuse, s':>10}{'ms per conv':>13}")
    for count in COUNTS:
        convert, fuse = (statistics.median(one[count][i] for one in spent) for i in (0, 1))
        print(f"{count:6}{convert:12.1f}{1000 * convert / count:13.1f}{fuse:10.1f}{1000 * fuse / count:13.2f}")


def show_memory(gigabytes: float) -> None:
    with torch.device("meta"):
        net = sized(gigabytes)
    size = bytes_of(net)
    results = {recipe: bytes_of(surgeon.convert(net, recipe, INPUT)) for recipe in ("acnet", "hetconv-p4", "octave")}
    here = str(Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        file, out = str(Path(folder) / "large.pt"), str(Path(folder) / "out.pt")
        save = f"torch.save(nn.Sequential(*(nn.Sequential(b.conv, b.bn) for b in large())), {file!r})"
        peak(sys.executable, "-c", "from torch import nn\n" + SCRIPT.format(folder=here, gigabytes=gigabytes, way=save))
        shape = ",".join(map(str, INPUT))
        cli = (sys.executable, "-m", "surgeon", "convert", file, "--recipe", "acnet", f"--input={shape}")
        commands = {
            name: (sys.executable, "-c", SCRIPT.format(folder=here, gigabytes=gigabytes, way=way))
            for name, way in WAYS.items()
        }
        commands["surgeon convert, acnet"] = (*cli, "-o", out, "--force")
        peaks = {name: peak(*command) for name, command in commands.items()}
    imports = peaks["imports only"] / 1e6
    made = ", ".join(f"{recipe} {result / 1e9:.2f} GB" for recipe, result in results.items())
    print(f"\n{size / 1e9:.2f} GB; as {made}; peak memory without the {imports:.0f} MB of imports")
    print(f"{'':27}{'':9}{'of the model':>14}{'of the result':>15}")
    for name in list(peaks)[1:]:
        more, result = peaks[name] - peaks["imports only"], results.get(name.rpartition(", ")[2], size)
        print(f"{name:27}{more / 1e9:6.2f} GB{more / size:14.2f}{more / result:15.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.gigabytes:
        show_memory(given.gigabytes)
    if given.rounds:
        show_time(given.rounds)


if __name__ == "__main__":
    main()
