"""Train the network of `surgeon demo` and write its two files: the weights, and the images the demo shows.

Fashion-MNIST comes as four gzipped IDX files, which Debian's package `dataset-fashion-mnist` puts where `--data`
looks by default. The demo's training images are drawn from the training split, its test images from the test split.

The shipped files are the last of 12 epochs with the defaults: 7 minutes on two cores; they classify 92.5 % of the
10,000 test images and 93.4 % of the training images correctly. Run this from the repository's root:

    PYTHONPATH=. python scripts/train_demo.py --out surgeon/app/demo

It trains the other networks of demo_networks.py, too, whose weights alone are written, best on a GPU:

    PYTHONPATH=. python scripts/train_demo.py --network deep --device cuda --amp --save deep.safetensors
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from demo_networks import NETWORKS, Network
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet

SHIFT = 2  # pixels an image may move each way while training


class Split(NamedTuple):
    """One split as bytes: images (n, 28, 28) and classes (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


def main() -> None:
    """Train the network, report its accuracy, and write the files."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train = read_split(options.data, "train", options.device, options.train_images)
    test = read_split(options.data, "t10k", options.device)
    network = NETWORKS[options.network]
    if options.network == "small":
        network = Network(lambda: SmallResNet(options.width))
    model = network.build().to(options.device, memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train.labels)} training images")

    start = time.perf_counter()
    for epoch, loss in enumerate(fit(model, network, train, options), start=1):
        right, took = accuracy(model, network, test), time.perf_counter() - start
        print(f"epoch {epoch:2}  loss {loss:.3f}  test accuracy {right:.2%}  {took:.0f} s", flush=True)
    print(f"accuracy without augmentation on the training split {accuracy(model, network, train):.2%}")
    if options.save:
        report(options.save, weights(model))
        return

    picked = {"train": pick(train, 40, options.seed), "test": pick(test, 50, options.seed)}
    print(f"accuracy on the shipped test images {accuracy(model, network, picked['test']):.2%}")
    write(options.out, model, picked)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the IDX files")
    parser.add_argument("--out", type=Path, default=Path("surgeon/app/demo"), help="folder for the safetensors files")
    parser.add_argument("--save", type=Path, help="safetensors file for the weights; nothing goes to --out then")
    parser.add_argument("--network", choices=NETWORKS, default="small", help="small is the demo's")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--train-images", type=int, help="train on the first ones only")
    parser.add_argument("--width", type=int, default=16, help="of small's first stage; the demo expects the default")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the choice of images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="the highest learning rate of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cuda keeps all images on the GPU")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where autocast does")
    options = parser.parse_args()
    if options.network != "small" and not options.save:
        parser.error(f"--network {options.network} needs --save FILE, since the demo shows the small network only")
    return options


def read_split(folder: Path, name: str, device: str = "cpu", limit: int | None = None) -> Split:
    """Read one split, `train` or `t10k`, or the first images of it, onto a device."""
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:limit]
    return Split(pixels.to(device), read_idx(folder / f"{name}-labels-idx1-ubyte.gz")[:limit].to(device))


def read_idx(path: Path) -> torch.Tensor:
    """Read a gzipped IDX file of bytes: 0, 0, type, rank, then the sizes as big-endian words, then the numbers."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=header).reshape(sizes)


def fit(model: nn.Module, network: Network, train: Split, options: argparse.Namespace) -> Iterator[float]:
    """Train one epoch at a time with SGD; yields each epoch's mean loss."""
    device = train.pixels.device
    steps = -(-len(train.labels) // options.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, epochs=options.epochs, steps_per_epoch=steps, cycle_momentum=False
    )
    for _ in range(options.epochs):
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index in torch.randperm(len(train.labels), device=device).split(options.batch):
            x, y = network.images(augment(train.pixels[index])), train.labels[index].long()
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y, label_smoothing=options.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach().double() * len(index)  # stays on the device, which need not wait
        yield total.item() / len(train.labels)


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Mirror half of the images (n, h, w) left to right, and move each by up to `SHIFT` pixels, filling with black."""
    n, h, w = pixels.shape
    on = pixels.device
    padded = F.pad(pixels, (SHIFT, SHIFT, SHIFT, SHIFT))
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), device=on)
    rows, columns = top + torch.arange(h, device=on), left + torch.arange(w, device=on)  # (n, h), (n, w)
    columns = torch.where(torch.rand(n, 1, device=on) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n, device=on)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, network: Network, split: Split) -> float:
    """Measure the share of images classified correctly, in eval mode."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for pixels, labels in zip(split.pixels.split(500), split.labels.split(500), strict=True):
        logits = model(network.images(pixels).contiguous(memory_format=torch.channels_last))
        right += (logits.argmax(1) == labels).sum()
    return right.item() / len(split.labels)


def pick(split: Split, per_class: int, seed: int) -> Split:
    """Draw the same number of images of each class, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in split.labels.unique():
        (of_label,) = torch.where(split.labels == label)
        drawn.append(of_label[torch.randperm(len(of_label), generator=generator)[:per_class]])
    index = torch.cat(drawn)
    index = index[torch.randperm(len(index), generator=generator)]
    return Split(split.pixels[index], split.labels[index])


def write(folder: Path, model: nn.Module, picked: dict[str, Split]) -> None:
    """Write the weights and the picked images."""
    stored = {f"{name}_x": split.pixels.cpu() for name, split in picked.items()}
    stored |= {f"{name}_y": split.labels.cpu() for name, split in picked.items()}
    report(folder / data.WEIGHTS, weights(model))
    report(folder / data.IMAGES, stored)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the state on the CPU, contiguous again."""
    return {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}


def report(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file and say how large it is."""
    print(f"{path}: {path.write_bytes(save(tensors))} bytes")


if __name__ == "__main__":
    main()
