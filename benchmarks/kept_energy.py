"""What does choosing the channels buy? HetConv's three layouts on trained networks, before any further training.

For every layer: the share of the kernel's off-centre energy that is kept, and how far its output is from the conv's, on
real images with the trained network's own feature maps (relative L2, float64; the mean over layers).

    python benchmarks/kept_energy.py                            # the network that `surgeon demo` ships
    python benchmarks/kept_energy.py --weights FOLDER --width 32    # one that scripts/train_demo.py wrote there
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file

import surgeon
from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet

LAYOUTS = ("block", "interleaved", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a folder that scripts/train_demo.py wrote")
    parser.add_argument("--width", type=int, default=16, help="of that network")
    options = parser.parse_args()
    model = SmallResNet(options.width)
    model.load_state_dict(load_file(options.weights / data.WEIGHTS) if options.weights else data.weights())
    x = data.images().test_x[:200]
    print(f"{'P':>3} {'layout':>12} {'energy kept':>12} {'distance':>9}   by layer")
    for p in (2, 4, 8):
        for layout in LAYOUTS:
            overrides = [f"rules[0].with.p={p}", f"rules[0].with.layout={layout}"]
            plan = surgeon.plan(model, "hetconv-p4", x, overrides=overrides)
            report = surgeon.verify(model, surgeon.convert(model, plan, x), x)
            apart = [site.isolated for site in report.sites if site.kind_b == "HetConv"]
            kept = mean(entry.kept_energy[layout] for entry in plan.swaps if entry.kept_energy)
            layers = " ".join(f"{one:.2f}" for one in apart)
            print(f"{p:>3} {layout:>12} {kept:>12.1%} {mean(apart):>9.3f}   {layers}")


if __name__ == "__main__":
    main()
