"""Batches of images in a fixed order, which are the same numbers at every pass and in every process.

    Images      pictures that can be asked for one by one: files, arrays, random numbers
    Supply      batches in their order; a share of them, or two parts of them, are supplies again
    Picked      the supply of `Images`: a seeded permutation of them, cut into batches

The digest of a supply is a hash of its numbers as they lie in their source, of what is done to them, and of which of
them come in which order and batches. Labels are no part of it: what is fitted does not depend on them.
"""

from __future__ import annotations

import ctypes
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from surgeon.errors import DataError
from surgeon.models.call import Inputs


class Hash(Protocol):
    """A hash to which bytes are added."""

    def update(self, data: Buffer, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of the model: its images, and one whole number for each of them if there are labels."""

    inputs: Inputs
    labels: Tensor | None
    count: int


class Images(ABC):
    """Images that can be asked for by their numbers."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> Inputs:
        """Give these images as one call of the model."""

    @abstractmethod
    def examine(self, numbers: Sequence[int], digest: Hash) -> None:
        """Look at these images once before any is used, and add them to the digest.

        Raises:
            DataError: one of them cannot be read or is not finite, or all of them are one colour.
        """

    def name(self, number: int) -> str:
        """Say which image this is, for people who look for it."""
        return f"image {number}"


class Supply(ABC):
    """Batches in a fixed order."""

    @property
    @abstractmethod
    def counts(self) -> tuple[int, ...]:
        """How many images each batch has."""

    @property
    @abstractmethod
    def has_labels(self) -> bool: ...

    @property
    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def give(self, start: int) -> Iterator[Batch]:
        """Give the batches from this number on."""

    @abstractmethod
    def names(self, number: int) -> tuple[str, ...]:
        """Say which images the batch of this number holds."""

    @abstractmethod
    def only(self, numbers: Sequence[int]) -> Supply:
        """Keep the batches of these numbers, which ascend."""

    @abstractmethod
    def held_back(self, count: int, seed: int) -> tuple[Supply, Supply]:
        """Put about so many images aside: the rest, and these."""


@dataclass(frozen=True, slots=True)
class Picked(Supply):
    """Images in an order, cut into batches; `stamp` is the digest of them all."""

    source: Images
    labels: Tensor | None  # of all images of the source, by their numbers
    batches: tuple[tuple[int, ...], ...]
    stamp: str

    @classmethod
    def of(cls, source: Images, labels: Tensor | None, *, size: int, limit: int | None, seed: int, done: str) -> Picked:
        """Take the first of a seeded permutation; `done` says what is done to them, and is part of the digest."""
        order = permuted(len(source), seed)[:limit]
        digest = hashlib.sha256(f"{done}\n".encode())
        source.examine(order, digest)
        return cls(source, labels, _cut(order, size), digest.hexdigest())

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.batches))

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.stamp} {self.batches}".encode()).hexdigest()

    def give(self, start: int) -> Iterator[Batch]:
        for numbers in self.batches[start:]:
            labels = None if self.labels is None else self.labels[list(numbers)]
            yield Batch(self.source.take(numbers), labels, len(numbers))

    def names(self, number: int) -> tuple[str, ...]:
        return tuple(map(self.source.name, self.batches[number]))

    def only(self, numbers: Sequence[int]) -> Picked:
        return replace(self, batches=tuple(self.batches[i] for i in numbers))

    def held_back(self, count: int, seed: int) -> tuple[Picked, Picked]:
        images = [number for batch in self.batches for number in batch]
        check_held_back(count, len(images))
        aside = set(permuted(len(images), seed)[:count])
        size = max(self.counts)
        parts = ([one for i, one in enumerate(images) if (i in aside) is wanted] for wanted in (False, True))
        rest, held = (replace(self, batches=_cut(part, size)) for part in parts)
        return rest, held


def permuted(count: int, seed: int) -> list[int]:
    """Give the numbers below `count` in a seeded order.

    >>> sorted(permuted(4, seed=0))
    [0, 1, 2, 3]
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return order


def check_held_back(count: int, images: int) -> None:
    """Refuse to put aside no image, or all of them."""
    if not 0 < count < images:
        raise DataError(f"{count} of {images} images cannot be held back", todo="Give more images.")


def add_to(digest: Hash, tensor: Tensor) -> None:
    """Add dtype, shape and bytes of a tensor to a hash."""
    held = tensor.detach().cpu().contiguous()
    digest.update(f"{held.dtype} {tuple(held.shape)}\n".encode())
    if size := held.numel() * held.element_size():
        digest.update((ctypes.c_char * size).from_address(held.data_ptr()))


class Colours:
    """Whether images show anything: the lowest and the highest numbers of every channel so far."""

    def __init__(self) -> None:
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None

    def see(self, images: Tensor, axis: int) -> None:
        """Look at images whose channels are this axis."""
        others = [i for i in range(images.dim()) if i != axis % images.dim()]
        low, high = images.amin(others), images.amax(others)
        self._lowest = low if self._lowest is None else torch.minimum(self._lowest, low)
        self._highest = high if self._highest is None else torch.maximum(self._highest, high)

    def check(self) -> None:
        """Refuse images of one colour, all of them the same: nothing can be learnt from them."""
        if self._lowest is not None and self._highest is not None and torch.equal(self._lowest, self._highest):
            raise DataError(
                "all pixels of all images are equal, which says nothing about what a network sees",
                todo="Give images like those that it is used on.",
            )


def _cut(order: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))
