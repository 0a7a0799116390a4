"""The demo's weights and images, read from the files shipped beside this module.

Both files are written by `scripts/train_demo.py`. Images are kept as bytes, 0 to 255, and normalised when read:

    x = (pixel / 255 - MEAN) / STD

Xiao et al. 2017, Fashion-MNIST, arXiv:1708.07747; its licence is in LICENSE-fashion-mnist.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load

WEIGHTS = "weights.safetensors"
IMAGES = "fashion.safetensors"

# Mean and standard deviation of all pixels of the 60,000 training images, as fractions of white.
MEAN = 0.2860
STD = 0.3530


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Normalised images (n, 1, 28, 28) with their classes (n,): a few to train on, and others to test on."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def weights() -> dict[str, torch.Tensor]:
    """Read the trained state of a `SmallResNet()`.

    >>> from surgeon.app.demo.net import SmallResNet
    >>> SmallResNet().load_state_dict(weights())
    <All keys matched successfully>
    """
    return _read(WEIGHTS)


def images() -> Images:
    """Read 400 images of Fashion-MNIST's training split and 500 of its test split, the same number of each class.

    >>> images().test_x.shape
    torch.Size([500, 1, 28, 28])
    """
    stored = _read(IMAGES)
    return Images(
        train_x=normalise(stored["train_x"]),
        train_y=stored["train_y"].long(),
        test_x=normalise(stored["test_x"]),
        test_y=stored["test_y"].long(),
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Turn bytes (n, h, w) into float32 images (n, 1, h, w) of about zero mean and unit variance."""
    return (pixels.unsqueeze(1).float() / 255 - MEAN) / STD


def _read(name: str) -> dict[str, torch.Tensor]:
    """Read a shipped file, from a folder or from inside a zip."""
    return load(resources.files("surgeon.app.demo").joinpath(name).read_bytes())
