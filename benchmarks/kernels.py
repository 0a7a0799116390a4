"""The figure of the ACNet paper on the demo's images: one network trained as it is, as ACBlocks, and on the border.

    python benchmarks/kernels.py            trains three networks for a minute or two, and draws docs/images/kernels.svg

All three start at random and are trained with the same steps on the same 400 images of Fashion-MNIST. What is compared
is where in their kernels they have their large weights, as they are folded. How well they classify is printed as well.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import surgeon
from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet
from surgeon.app.demo.run import accuracy
from surgeon.display import kernel_pictures
from surgeon.recipes import recipe

WAYS: dict[str, list[str] | None] = {
    "normal": None,
    "ACNet, skeleton": [],
    "ACNet, border": ["rules[0].with.placement=border"],
}
PLACE = Path(__file__).parent.parent / "docs" / "images" / "kernels.svg"
BATCH = 50


def trained(settings: list[str] | None, images: data.Images, steps: int, seed: int) -> nn.Module:
    """Train one network from scratch."""
    torch.manual_seed(seed)
    net: nn.Module = SmallResNet()
    if settings is not None:
        net = surgeon.convert(net, recipe.load("acnet-scratch", settings), example=(1, 1, 28, 28), seed=seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    picks = torch.Generator().manual_seed(seed)
    net.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / steps))
        picked = torch.randperm(len(images.train_y), generator=picks)[:BATCH]
        down, right, mirror = (int(n) for n in torch.randint(0, 5, (3,), generator=picks))
        x = F.pad(images.train_x[picked], (2, 2, 2, 2), mode="replicate")[..., down : down + 28, right : right + 28]
        loss = F.cross_entropy(net(x.flip(-1) if mirror < 2 else x), images.train_y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PLACE)
    asked = parser.parse_args()
    images, nets = data.images(), {}
    for name, settings in WAYS.items():
        nets[name] = trained(settings, images, asked.steps, asked.seed)
        print(f"{name}: {accuracy(nets[name], images.test_x, images.test_y):.1%} of the test images", flush=True)
    figures = surgeon.kernels(nets, seed=asked.seed)
    print(figures)
    kernel_pictures.write(figures, asked.output, asked.output.suffix.removeprefix("."))


if __name__ == "__main__":
    main()
