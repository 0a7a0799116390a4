"""Train the network of `surgeon demo` and write its two files: the weights, and the images the demo shows.

Fashion-MNIST comes as four gzipped IDX files, which Debian's package `dataset-fashion-mnist` puts where `--data`
looks by default. The demo's training images are drawn from the training split, its test images from the test split.

The shipped files are the last of 12 epochs with the defaults: 7 minutes on two cores; they classify 92.5 % of the
10,000 test images and 93.4 % of the training images correctly. Run this from the repository's root:

    PYTHONPATH=. python scripts/train_demo.py --out surgeon/app/demo
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
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
    train, test = read_split(options.data, "train"), read_split(options.data, "t10k")
    model = SmallResNet(options.width).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train.labels)} training images")

    start = time.perf_counter()
    for epoch, loss in enumerate(fit(model, train, options), start=1):
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"epoch {epoch:2}  loss {loss:.3f}  test accuracy {accuracy(model, test):.2%}  {took}", flush=True)
    print(f"accuracy without augmentation on the training split {accuracy(model, train):.2%}")

    picked = {"train": pick(train, 40, options.seed), "test": pick(test, 50, options.seed)}
    print(f"accuracy on the shipped test images {accuracy(model, picked['test']):.2%}")
    write(options.out, model, picked)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the IDX files")
    parser.add_argument("--out", type=Path, default=Path("surgeon/app/demo"), help="folder for the safetensors files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=16, help="of the first stage; the demo expects the default")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the choice of images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="the highest learning rate of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def read_split(folder: Path, name: str) -> Split:
    """Read one split, `train` or `t10k`."""
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    return Split(pixels, read_idx(folder / f"{name}-labels-idx1-ubyte.gz"))


def read_idx(path: Path) -> torch.Tensor:
    """Read a gzipped IDX file of bytes: 0, 0, type, rank, then the sizes as big-endian words, then the numbers."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=header).reshape(sizes)


def fit(model: nn.Module, train: Split, options: argparse.Namespace) -> Iterator[float]:
    """Train one epoch at a time with SGD; yields each epoch's mean loss."""
    steps = -(-len(train.labels) // options.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, epochs=options.epochs, steps_per_epoch=steps, cycle_momentum=False
    )
    for _ in range(options.epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(train.labels)).split(options.batch):
            x, y = data.normalise(augment(train.pixels[index])), train.labels[index].long()
            logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y, label_smoothing=options.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        yield total / len(train.labels)


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Mirror half of the images (n, h, w) left to right, and move each by up to `SHIFT` pixels, filling with black."""
    n, h, w = pixels.shape
    padded = F.pad(pixels, (SHIFT, SHIFT, SHIFT, SHIFT))
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1))
    rows, columns = top + torch.arange(h), left + torch.arange(w)  # (n, h), (n, w)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Measure the share of images classified correctly, in eval mode."""
    model.eval()
    right = 0
    for pixels, labels in zip(split.pixels.split(500), split.labels.split(500), strict=True):
        logits = model(data.normalise(pixels).contiguous(memory_format=torch.channels_last))
        right += int((logits.argmax(1) == labels).sum())
    return right / len(split.labels)


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
    """Write the weights, contiguous again, and the picked images."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    stored = {f"{name}_x": split.pixels for name, split in picked.items()}
    stored |= {f"{name}_y": split.labels for name, split in picked.items()}
    for name, tensors in ((data.WEIGHTS, state), (data.IMAGES, stored)):
        size = (folder / name).write_bytes(save(tensors))
        print(f"{folder / name}: {size} bytes")


if __name__ == "__main__":
    main()
