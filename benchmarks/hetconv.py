"""Do HetConv's multiply-adds become time? One 3×3 layer, dense against P = 4 and P = 8, side by side in one run.

The promise is the ratio of executed multiply-adds, dense / HetConv; the goal is a speed-up of 0.8 of it. Layers are
those of the paper's networks (channels at the size of their feature map), in NCHW and in channels_last.

    python benchmarks/hetconv.py --batch 8 --rounds 25

With `--deployed`, the forms that `surgeon fuse --tune` chooses from, beside the dense conv.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import nn

from surgeon.analysis import example as examples
from surgeon.blocks.hetconv import HetConv, HetConvOptions, Layout
from surgeon.surgery import bench
from surgeon.surgery.bench import Setting, Timing

SHAPES = ((128, 28), (256, 14), (512, 7))
LAYOUTS: tuple[Layout, ...] = ("block", "interleaved", "best")
GOAL = 0.8


def layer(channels: int, p: int | None, layout: Layout = "block") -> HetConv | nn.Conv2d:
    """A 3×3 conv, or a HetConv in its place."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    if p is None:
        return conv
    return HetConv.from_conv(conv, HetConvOptions(p=p, layout=layout), norm=None, generator=torch.Generator())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", action="store_true", help="a training step instead of a pass in eval mode")
    parser.add_argument("--deployed", action="store_true", help="the forms of fuse --tune")
    options = parser.parse_args()
    settings = [Setting(options.batch, options.threads, last, train=options.train) for last in (False, True)]
    if options.deployed:
        deployed(settings, options.batch, options.rounds)
        return
    columns = ("layer", "format", "dense ms", "P", "ms", "promised", "speed-up", "share", "quartiles of the share")
    print("{:>8} {:>13} {:>9} {:>3} {:>7} {:>9} {:>9} {:>6}   {}".format(*columns))
    for channels, side in SHAPES:
        models = [("dense", layer(channels, None)), *((f"P={p}", layer(channels, p)) for p in (4, 8))]
        timings = bench.run(models, examples.make((1, channels, side, side)), settings, rounds=options.rounds)
        for dense, *thin in (timings[:3], timings[3:]):
            for one in thin:
                show(f"{channels}@{side}", dense, one)


def deployed(settings: list[Setting], batch: int, rounds: int) -> None:
    """Print the speed of every form that `surgeon fuse --tune` chooses from, as a share of what was promised."""
    print(f"{'layer':>8} {'format':>13} {'P':>3} {'layout':>11} {'promised':>9}   share of it, in each form")
    for (channels, side), p, layout in itertools.product(SHAPES, (4, 8), LAYOUTS):
        block = layer(channels, p, layout)
        assert isinstance(block, HetConv)
        models = [("dense conv", layer(channels, None)), ("block", block)]
        models += [
            (name, make()) for name, make in block.forms().items() if name != "dense" and block.is_tried_on(name, "cpu")
        ]
        timings = bench.run(models, examples.make((1, channels, side, side)), settings, rounds=rounds)
        for setting in settings:
            kind = "channels_last" if setting.channels_last else "NCHW"
            ones = [one for one in timings if one.setting == setting and one.form == "as it is"]
            promised = next(1 / one.macs_ratio for one in ones if one.model == "plain" and one.macs_ratio)
            shares = ", ".join(f"{one.model} {1 / one.time_ratio / promised:.2f}" for one in ones[1:])
            print(f"{f'{channels}@{side}':>8} {kind:>13} {p:>3} {layout:>11} {promised:9.2f}   {shares}")


def show(name: str, dense: Timing, one: Timing) -> None:
    """Print one line: what was promised, what was measured, and whether it reaches the goal."""
    assert one.macs_ratio is not None
    promised, low, high = 1 / one.macs_ratio, *one.quartiles
    share = 1 / one.time_ratio / promised
    layout = "channels_last" if one.setting.channels_last else "NCHW"
    mark = "" if share >= GOAL else f"   below {GOAL}"
    times = f"{dense.seconds * 1e3:9.2f} {one.model[2:]:>3} {one.seconds * 1e3:7.2f}"
    found = f"{promised:9.2f} {1 / one.time_ratio:9.2f} {share:6.2f}"
    print(f"{name:>8} {layout:>13} {times} {found}   {1 / high / promised:.2f} … {1 / low / promised:.2f}{mark}")


if __name__ == "__main__":
    main()
