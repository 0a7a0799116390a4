"""Batches that a user's code yields: a DataLoader, a list, a function that gives one of them, or a generator.

What can be iterated again is iterated again at every pass; a function whose result cannot, or is not the same again, is
called again. Random states begin every pass from the same seed, and are the code's own while it lasts. The first pass
counts, checks and hashes all batches; every later one is compared with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.files.names import Trust
from surgeon.fitting import labels as label
from surgeon.fitting import stored
from surgeon.fitting.supply import Batch, Colours, Supply, add_to, check_held_back, permuted
from surgeon.models.call import Inputs
from surgeon.models.copies import where
from surgeon.models.sandbox import OwnRandomStates

_SAME = "It has to give the same batches at every pass: seed it anew each time, or shuffle=False."
_YIELD = "Yield images (n, channels, height, width), a tuple (images, labels), or a dict of arguments."


@dataclass(slots=True)
class Loader:
    """A user's batches: `make` gives what is iterated, and is called once unless that does not do."""

    name: str
    make: Callable[[], Any]
    seed: int = 0
    takes: tuple[str, ...] | None = None  # the names of what the model takes, for batches that are dicts
    is_made_anew: bool = False
    _made: Any = None

    def items(self) -> Iterator[Any]:
        """Begin a pass.

        Raises:
            DataError: the code fails, or gives nothing that can be iterated.
        """
        if self._made is None or self.is_made_anew:
            self.made()
        states = OwnRandomStates(self.seed)
        with states.step(), _Named(self.name):
            items = iter(self._iterable())
        while True:
            with states.step(), _Named(self.name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def made(self) -> Any:
        """Call the function; what it gives is what the next pass iterates."""
        with OwnRandomStates(self.seed).step(), _Named(self.name):
            self._made = self.make()
        return self._made

    def _iterable(self) -> Iterable[Any]:
        if isinstance(self._made, Iterable) and not isinstance(self._made, str | bytes | Mapping):
            return self._made
        kind = type(self._made).__name__
        what = f"data of type {kind}" if self.name == f"a {kind}" else f"{self.name} gives data of type {kind}, which"
        raise DataError(f"{what} does not yield batches", todo=_YIELD)


class _Named:
    """Whatever a user's code raises is a DataError that names it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError | StopIteration):
            raise DataError(f"{self._name} failed: {where(error)}", todo="Try it alone first.") from error


@dataclass(frozen=True, slots=True)
class Stream(Supply):
    """The batches of a loader, of which some numbers are kept."""

    loader: Loader
    seen: tuple[tuple[int, str], ...]  # of every batch of the first pass: its images, and their hash
    kept: tuple[int, ...]
    limit: int | None = None
    wants_own: bool = False
    labels: Tensor | None = field(default=None, repr=False)  # that the user has given, in the order of the images
    stamp: str = ""

    @classmethod
    def read(cls, loader: Loader, *, limit: int | None, wants_own: bool, done: str) -> Stream:
        """Make the first pass, and begin a second one to see whether it is the same.

        Raises:
            DataError: what is yielded cannot be used.
        """
        first = cls(loader, (), (), limit, wants_own)
        look = _Look()
        seen = tuple((batch.count, look.at(batch)) for batch in first._all())
        look.finish(loader.name)
        stamp = hashlib.sha256("\n".join([done, *(f"{count} {text}" for count, text in seen)]).encode()).hexdigest()
        stream = replace(first, seen=seen, kept=tuple(range(len(seen))), stamp=stamp)
        if not stream._begins_the_same():
            loader.is_made_anew = True
            if not stream._begins_the_same():
                raise DataError(f"{loader.name} gives other batches at its second pass", todo=_SAME)
        return stream

    def labelled(self, labels: Tensor) -> Stream:
        return replace(self, labels=labels)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(self.seen[i][0] for i in self.kept)

    @property
    def has_labels(self) -> bool:
        return self.wants_own or self.labels is not None

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.stamp} {self.kept}".encode()).hexdigest()

    def give(self, start: int) -> Iterator[Batch]:
        wanted = frozenset(self.kept[start:])
        offsets = [0, *accumulate(count for count, _ in self.seen)]
        is_whole = self.limit is None and len(self.seen) - 1 in wanted
        given = 0
        for i, batch in enumerate(self._all() if wanted else ()):
            if i >= len(self.seen) or (i in wanted and (batch.count, _hash(batch)) != self.seen[i]):
                raise DataError(f"{self.loader.name} gives another batch {i} than at its first pass", todo=_SAME)
            if i in wanted:
                labels = batch.labels if self.labels is None else self.labels[offsets[i] : offsets[i + 1]]
                yield Batch(batch.inputs, labels, batch.count)
                given += 1
            if given == len(wanted) and not is_whole:
                break
        if given < len(wanted):
            raise DataError(f"{self.loader.name} gives fewer batches than at its first pass", todo=_SAME)

    def names(self, number: int) -> tuple[str, ...]:
        kept = self.kept[number]
        first = sum(count for count, _ in self.seen[:kept])
        return tuple(f"image {first + i} (batch {kept}, row {i})" for i in range(self.seen[kept][0]))

    def only(self, numbers: Sequence[int]) -> Stream:
        return replace(self, kept=tuple(self.kept[i] for i in numbers))

    def held_back(self, count: int, seed: int) -> tuple[Stream, Stream]:
        check_held_back(count, sum(self.counts))
        aside: set[int] = set()
        for i in permuted(len(self.kept), seed):
            if sum(self.counts[j] for j in aside) < count:
                aside.add(i)
        if len(aside) == len(self.kept):
            todo = "Let it yield smaller batches, or more of them."
            raise DataError(f"{self.loader.name} gives too few batches to hold {count} images back", todo=todo)
        numbers = range(len(self.kept))
        return self.only([i for i in numbers if i not in aside]), self.only(sorted(aside))

    def _all(self) -> Iterator[Batch]:
        """Give the batches of a pass up to the limit, each checked for its form."""
        left = self.limit
        for number, item in enumerate(self.loader.items()):
            batch = _batch(item, self.loader, self.wants_own, number)
            if left is not None and batch.count > left:
                labels = None if batch.labels is None else batch.labels[:left]
                batch = Batch(batch.inputs.batched(left), labels, left)
            yield batch
            left = None if left is None else left - batch.count
            if left == 0:
                return

    def _begins_the_same(self) -> bool:
        batch = next(self._all(), None)
        return batch is not None and (batch.count, _hash(batch)) == self.seen[0]


class _Look:
    """What the first pass is checked for."""

    def __init__(self) -> None:
        self._channels: list[tuple[int, ...]] = []
        self._colours = Colours()
        self._batches = 0

    def at(self, batch: Batch) -> str:
        """Check one batch, and hash it."""
        number, self._batches = self._batches, self._batches + 1
        tensors = [one for one in batch.inputs.tensors if one.is_floating_point()]
        for tensor in tensors:
            if not torch.isfinite(tensor).all():
                bad = next((i for i, row in enumerate(tensor) if not torch.isfinite(row).all()), 0)
                raise DataError(
                    f"batch {number} holds NaN or infinite numbers, in image {bad} of it (both counted from 0)",
                    todo="Leave that image out, or mend how it is read.",
                )
        self._check_channels(batch, number)
        images = batch.inputs.args[0] if len(batch.inputs.args) == 1 else None
        for image in [images] if isinstance(images, Tensor) else images if isinstance(images, list) else []:
            self._colours.see(image, -3)
        return _hash(batch)

    def finish(self, name: str) -> None:
        if not self._batches:
            raise DataError(f"{name} yields nothing", todo=_YIELD)
        self._colours.check()

    def _check_channels(self, batch: Batch, number: int) -> None:
        channels = tuple(int(one.shape[-3]) for one in batch.inputs.tensors if one.dim() in (3, 4))
        is_list = any(one.dim() == 3 for one in batch.inputs.tensors)  # pictures of a detector: as many as there are
        self._channels.append(tuple(sorted(set(channels))) if is_list else channels)
        if self._channels[-1] != self._channels[0]:
            old, new = ("/".join(map(str, one)) or "no" for one in (self._channels[0], self._channels[-1]))
            raise DataError(
                f"batch {number} has {new} channels, and those before it {old}", todo="Make all images of one kind."
            )


def _batch(item: Any, loader: Loader, wants_own: bool, number: int) -> Batch:
    """Take what a loader yields apart: what the model is called with, and labels where they are asked for."""
    inputs, beside = _parts(item, loader)
    count = inputs.batch if inputs.has_tensors else 0
    if not count or any(one.numel() == 0 or one.dim() == 0 for one in inputs.tensors):
        raise DataError(f"{loader.name}: batch {number} (counted from 0) holds no images", todo=_YIELD)
    if len(inputs.args) == 1 and isinstance(image := inputs.args[0], Tensor) and image.dim() < 4:
        shape = "×".join(map(str, image.shape))
        raise DataError(f"{loader.name} yields {shape}, which is not a batch of images", todo=_YIELD)
    if not wants_own:
        return Batch(inputs, None, count)
    array = stored.in_memory(beside) if beside is not None else None
    if beside is None or (array is None and not isinstance(beside, list | tuple)):
        raise DataError(f"{loader.name} yields no labels", todo="Yield (images, labels), or give them in a file.")
    return Batch(inputs, label.given(beside, count, Trust()), count)


def _parts(item: Any, loader: Loader) -> tuple[Inputs, Any]:
    if isinstance(item, Inputs):
        return item, None
    if isinstance(item, Mapping):
        return _named_parts({str(name): value for name, value in item.items()}, loader)
    if isinstance(item, tuple | list) and item and not _is_list_of_pictures(item):
        return _parts(item[0], loader)[0], item[1] if len(item) > 1 else None
    value = [_tensor(one) for one in item] if isinstance(item, tuple | list) else _tensor(item)
    if value is None or (isinstance(value, list) and not value):
        raise DataError(f"{loader.name} yields a {type(item).__name__}", todo=_YIELD)
    return Inputs((value,)), None


def _named_parts(item: dict[str, Any], loader: Loader) -> tuple[Inputs, Any]:
    """Take a dict apart: labels by their usual names, then named arguments, or the one tensor that there is."""
    takes = loader.takes
    name_of_labels = next((name for name in item if name.lower() in label.NAMES and name not in (takes or ())), None)
    beside = item.pop(name_of_labels) if name_of_labels is not None else None
    tensors = {name: value for name, one in item.items() if (value := _tensor(one)) is not None}
    named = {name: value for name, value in tensors.items() if takes is None or name in takes}
    if takes is None and len(tensors) > 1:
        return Inputs(kwargs=named), beside
    if takes is not None and named:
        return Inputs(kwargs=named), beside
    images = [one for one in tensors.values() if one.dim() == 4 and one.is_floating_point()] or list(tensors.values())
    if len(images) != 1:
        names = ", ".join(item) or "nothing"
        todo = f"Name what the model takes ({', '.join(takes or ()) or 'one tensor'}), or yield (images, labels)."
        raise DataError(f"{loader.name} yields a dict of {names}, which does not show the images", todo=todo)
    return Inputs((images[0],)), beside


def _is_list_of_pictures(item: Sequence[Any]) -> bool:
    return all(isinstance(one, Tensor) and one.dim() == 3 for one in item)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    array = stored.in_memory(value)
    return None if array is None or not array.shape else array.rows(range(array.shape[0]))


def _hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in batch.inputs.tensors:
        add_to(digest, tensor)
    return digest.hexdigest()
