"""Example inputs: what a person gives (`1,3,224,224`, a tensor), and what is known without asking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.capture import observe
from surgeon.errors import CaptureError

Shape = tuple[int, ...]
Example = Shape | Tensor | tuple[Tensor, ...]  # a shape, or the arguments themselves

# What torchvision's own networks were trained on, where it is not 224×224.
_TORCHVISION_SIZES = {"torchvision.models.inception": (3, 299, 299)}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Positional arguments for one call of a model; `is_guess` when nobody gave them."""

    tensors: tuple[Tensor, ...]
    is_guess: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(tuple(t.shape) for t in self.tensors)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Give the tensors with their floating point ones in `dtype`."""
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in self.tensors)

    def __str__(self) -> str:
        return ", ".join("×".join(map(str, shape)) for shape in self.shapes)


def parse(text: str) -> Shape:
    """Read a shape as the command line writes it.

    >>> parse("1,3,224,224")
    (1, 3, 224, 224)
    """
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise CaptureError(
            f"--input {text!r} is not a shape", todo="Write batch, channels, height, width: --input 1,3,224,224."
        )
    return shape


def make(example: Example, *, seed: int = 0) -> Inputs:
    """Turn a shape into seeded normal noise in float64; tensors are taken as they are.

    >>> make((1, 3, 8, 8)).shapes
    ((1, 3, 8, 8),)
    """
    if isinstance(example, Tensor):
        return Inputs((example,))
    if example and all(isinstance(part, Tensor) for part in example):
        return Inputs(tuple(part for part in example if isinstance(part, Tensor)))
    if not example or not all(isinstance(part, int) and part > 0 for part in example):
        raise CaptureError(
            f"example {example!r} is neither a shape, nor a tensor, nor tensors",
            todo="Give a shape such as (1, 3, 224, 224).",
        )
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(part for part in example if isinstance(part, int))
    return Inputs((torch.randn(shape, generator=generator, dtype=torch.float64),))


def guess(model: nn.Module, *, seed: int = 0) -> Inputs | None:
    """Find an input that the model accepts, trying what its library says and then common sizes; None if none does."""
    for shape in _candidates(model):
        inputs = make(shape, seed=seed)
        try:
            observe(model, inputs.tensors, meta_only=True)
        except CaptureError:
            continue
        return Inputs(inputs.tensors, is_guess=True)
    return None


def _candidates(model: nn.Module) -> Iterator[Shape]:
    config = getattr(model, "pretrained_cfg", None)  # timm's networks carry their size
    if isinstance(config, dict) and config.get("input_size"):
        yield (1, *config["input_size"])
    if size := _TORCHVISION_SIZES.get(type(model).__module__):
        yield (1, *size)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels:
        for side in (224, 299, 256, 64, 32, 28):
            yield (1, first.in_channels, side, side)
