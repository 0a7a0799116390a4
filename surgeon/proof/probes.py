"""Inputs that the user did not give: two images of another size, and larger numbers, on which other faults show.

A pooling of fixed size, a clip at 100 or a conv that mixes the images of a batch does on one small input what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from surgeon.models.call import Inputs

LARGER = 16.0  # times the spread of the user's numbers, in the second image
_LARGE = 160  # pixels from which a smaller size is tried, not a larger one: it costs less
_SMALL = (64, 96)  # which size that is, of the two sides


def probes(given: Inputs, seed: int) -> list[Inputs]:
    """Draw inputs like the given one, the most telling first; the first that A accepts is used.

    >>> [str(one) for one in probes(Inputs((torch.zeros(1, 3, 16, 16),)), seed=0)]
    ['2×3×24×32', '2×3×16×16', '1×3×16×16']
    """
    return list(_probes(given, seed))


def _probes(given: Inputs, seed: int) -> Iterator[Inputs]:
    if not any(t.is_floating_point() and t.numel() for t in given.tensors):
        return
    alone = given.tensors[0] if len(given.tensors) == 1 else None
    if alone is not None and alone.dim() == 4 and alone.is_floating_point():
        height, width = alone.shape[2:]
        yield _drawn(given, seed, 2, (_other(height, 1), _other(width, 2)))
        yield _drawn(given, seed, 2, (height, width))
    yield _larger(given.alike(1, seed)[0])


def positive(given: Inputs, seed: int) -> list[Inputs]:
    """Draw inputs like the given one, of numbers from 0 to 255 times its spread, as pictures have them.

    The first that A accepts is used: a single smaller image, if the given ones are large, then all of them.

    >>> [str(one) for one in positive(Inputs((torch.zeros(4, 3, 224, 224),)), seed=0)]
    ['1×3×64×96', '4×3×224×224']
    """
    if not any(t.is_floating_point() and t.numel() for t in given.tensors):
        return []
    generator = torch.Generator().manual_seed(seed + 4)

    def draw(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        spread = tensor.double().std(correction=0).item() or 1.0
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 255 * spread).to(tensor)

    def drawn(tensor: Tensor) -> Tensor:
        return draw(tensor, tensor.shape) if tensor.is_floating_point() and tensor.numel() else tensor

    found = [given.map(drawn)]
    alone = given.tensors[0]
    if len(given.tensors) == 1 and alone.dim() == 4 and min(alone.shape[2:]) >= _LARGE:
        small = (1, alone.shape[1], *(_other(side, i) for i, side in enumerate(alone.shape[2:], 1)))
        found.insert(0, given.map(lambda tensor: draw(tensor, small)))
    return [Inputs(one.args, one.kwargs) for one in found]


def _other(side: int, steps: int) -> int:
    return _SMALL[steps - 1] if side >= _LARGE else side + steps * (32 if side >= 64 else 8)


def _drawn(given: Inputs, seed: int, batch: int, size: tuple[int, int]) -> Inputs:
    generator = torch.Generator().manual_seed(seed + 2)

    def draw(tensor: Tensor) -> Tensor:
        numbers = tensor.double()
        spread = numbers.std(correction=0).item() or 1.0
        drawn = torch.randn((batch, tensor.shape[1], *size), generator=generator, dtype=torch.float64)
        drawn = drawn * spread + numbers.mean().item()
        drawn[-1] *= LARGER
        return drawn.to(tensor)

    made = given.map(draw)
    return Inputs(made.args, made.kwargs)


def _larger(given: Inputs) -> Inputs:
    made = given.map(lambda t: t * LARGER if t.is_floating_point() else t)
    return Inputs(made.args, made.kwargs)
