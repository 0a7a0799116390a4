"""Do OctaveConv's multiply-adds become time? ResNet-50 at α = ½, side by side in one run.

    python benchmarks/octave.py [--rounds 15] [--no-compile] [--no-train]

Three networks take turns, all with folded norms, in channels_last: torchvision's ResNet-50; what `surgeon convert -r
octave` and `surgeon fuse` make of it; and an Oct-ResNet-50 written by hand, in which every layer carries a pair of
tensors, as published code does. Then a training step of the three, norms unfolded.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
import torchvision
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis import example as examples
from surgeon.surgery.bench import Setting, Timing, deployed, run

ALPHA = 0.5
Pair = tuple[Tensor, Tensor | None]


class OctConv(nn.Module):
    """Equations 2 to 5 of the paper with four convs; at stride 2 all is pooled first, but not l on its way to h."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int, alpha: tuple[float, float]) -> None:
        super().__init__()
        low_in, low_out = int(alpha[0] * c_in), int(alpha[1] * c_out)
        conv = functools.partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2, bias=False)
        self.stride = stride
        self.h2h = conv(c_in - low_in, c_out - low_out)
        self.h2l = conv(c_in - low_in, low_out) if low_out else None
        self.l2h = conv(low_in, c_out - low_out) if low_in else None
        self.l2l = conv(low_in, low_out) if low_in and low_out else None

    def forward(self, pair: Pair) -> Pair:
        high, low = pair
        if self.stride == 2:
            high = F.avg_pool2d(high, 2, 2)
        out_high = self.h2h(high)
        out_low = None if self.h2l is None else self.h2l(F.avg_pool2d(high, 2, 2))
        if low is not None and self.l2h is not None:
            across = self.l2h(low)
            out_high = out_high + (across if self.stride == 2 else F.interpolate(across, scale_factor=2))
        if low is not None and self.l2l is not None and out_low is not None:
            out_low = out_low + self.l2l(F.avg_pool2d(low, 2, 2) if self.stride == 2 else low)
        return out_high, out_low


class Normed(nn.Module):
    """An OctConv with a norm for each stream; then a ReLU, unless a sum comes first."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, alpha: tuple[float, float], relu: bool = True
    ) -> None:
        super().__init__()
        low = int(alpha[1] * c_out)
        self.conv = OctConv(c_in, c_out, kernel, stride=stride, alpha=alpha)
        self.bn_h, self.bn_l = nn.BatchNorm2d(c_out - low), nn.BatchNorm2d(low) if low else None
        self.relu = relu

    def forward(self, pair: Pair) -> Pair:
        high, low = self.conv(pair)
        high = self.bn_h(high)
        low = None if low is None or self.bn_l is None else self.bn_l(low)
        return activated((high, low)) if self.relu else (high, low)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 beside a shortcut; `alphas` are those of the input, in between, and of the output."""

    def __init__(self, c_in: int, width: int, stride: int, alphas: tuple[float, float, float]) -> None:
        super().__init__()
        before, within, behind = alphas
        self.first = Normed(c_in, width, 1, alpha=(before, within))
        self.second = Normed(width, width, 3, stride=stride, alpha=(within, within))
        self.third = Normed(width, 4 * width, 1, alpha=(within, behind), relu=False)
        self.shortcut = None
        if stride != 1 or c_in != 4 * width:
            self.shortcut = Normed(c_in, 4 * width, 1, stride=stride, alpha=(before, behind), relu=False)

    def forward(self, pair: Pair) -> Pair:
        high, low = self.third(self.second(self.first(pair)))
        beside_high, beside_low = pair if self.shortcut is None else self.shortcut(pair)
        return activated((high + beside_high, None if low is None or beside_low is None else low + beside_low))


def activated(pair: Pair) -> Pair:
    high, low = pair
    return high.relu_(), None if low is None else low.relu_()


class OctResNet50(nn.Module):
    """A plain stem, three stages in two streams, and a plain last one."""

    def __init__(self, alpha: float = ALPHA) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks, c_in = [], 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            inside = 0.0 if stage == 3 else alpha
            for i in range(count):
                before = 0.0 if (stage == 0 and i == 0) else alpha if i == 0 else inside
                blocks.append(Bottleneck(c_in, width, 2 if stage and i == 0 else 1, (before, inside, inside)))
                c_in = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(c_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        high, _ = self.blocks((self.stem(x), None))
        return self.fc(high.mean((2, 3)))


def measure(models: Sequence[tuple[str, nn.Module]], setting: Setting, rounds: int) -> tuple[Timing, ...]:
    inputs = examples.make((1, 3, 224, 224))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        return run(
            models,
            inputs,
            [setting],
            rounds=rounds,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-train", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(weights=None).eval()
    octave, by_hand = surgeon.convert(plain, "octave", (1, 3, 224, 224)), OctResNet50().eval()
    folded = [
        (name, deployed(net)[0]) for name, net in (("resnet50", plain), ("surgeon", octave), ("by hand", by_hand))
    ]
    plainly = [("resnet50", plain), ("surgeon", octave), ("by hand", by_hand)]
    threads = torch.get_num_threads()
    print("| setting | network | ms | × multiply-adds | speed (quartiles of the pairwise ratio) |")
    print("|---|---|---|---|---|")
    for batch, count in ((8, threads), (1, threads), (1, 1)):
        show(measure(folded, Setting(batch, count, channels_last=True), options.rounds))
    if not options.no_train:
        show(measure(plainly, Setting(8, threads, channels_last=True, train=True), max(5, options.rounds // 2)))
    for batch in () if options.no_compile else (8, 1):
        show(measure(folded[:2], Setting(batch, threads, channels_last=True, compiled=True), options.rounds))


def show(timings: Sequence[Timing]) -> None:
    for one in timings:
        low, high = one.quartiles
        speed = f"{1 / one.time_ratio:.2f} ({1 / high:.2f} … {1 / low:.2f})"
        row = f"| {one.setting} | {one.model} | {one.seconds * 1e3:.0f} | {one.macs_ratio:.3f} | {speed} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
