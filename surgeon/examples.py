"""Example inputs: what a person gives (`1,3,224,224`, a tensor), and what is known without asking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from surgeon.capture import observe
from surgeon.errors import CaptureError

Shape = tuple[int, ...]
Example = Shape | Tensor | tuple[Tensor | Shape, ...]  # a shape, or the arguments themselves, or their shapes

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

    def batched(self, count: int) -> Inputs:
        """Repeat or cut every tensor to a batch of `count`."""
        return Inputs(tuple(t[torch.arange(count) % len(t)] for t in self.tensors))

    def alike(self, count: int, seed: int) -> list[Inputs]:
        """Draw more inputs of this kind: noise of the same shape, mean and spread; none if there is nothing to draw."""
        if not any(t.is_floating_point() for t in self.tensors):
            return []
        generator = torch.Generator().manual_seed(seed + 1)
        return [Inputs(tuple(_like(t, generator) for t in self.tensors)) for _ in range(count)]

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
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(example, Tensor | tuple | list):
        raise _no_example(example)
    parts: Any = [example] if isinstance(example, Tensor) or _is_shape(example) else example
    if not parts or not all(isinstance(part, Tensor) or _is_shape(part) for part in parts):
        raise _no_example(example)
    return Inputs(tuple(part if isinstance(part, Tensor) else _noise(part, generator) for part in parts))


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


def _is_shape(part: object) -> TypeGuard[Sequence[int]]:
    return isinstance(part, tuple | list) and bool(part) and all(type(side) is int and side > 0 for side in part)


def _no_example(example: object) -> CaptureError:
    return CaptureError(
        f"example {example!r} is neither a shape, nor a tensor, nor several of them",
        todo="Give a shape such as (1, 3, 224, 224).",
    )


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    try:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    except (RuntimeError, MemoryError, OverflowError) as error:
        sides = "×".join(map(str, shape))
        raise CaptureError(f"an input of {sides} does not fit into memory", todo="Give a smaller shape.") from error


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    spread, mean = tensor.double().std(correction=0).item(), tensor.double().mean().item()
    return (_noise(tensor.shape, generator) * (spread or 1.0) + mean).to(tensor)


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
