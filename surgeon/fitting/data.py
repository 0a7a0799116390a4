"""The images that a network is fitted to: what the user names or gives → `Data`, the same batches at every pass.

    photos/                       a folder of pictures, at any depth
    x.npz, x.npy, x.safetensors, x.pt     arrays: bytes are pictures, floats are what the model takes
    x.npz:train_x                 one of several arrays
    file.py:loader, pkg.mod:loader        a function without arguments that gives anything that yields batches
    noise, noise:512              random numbers, which is a bad idea

All but loaders are taken in a seeded permutation, the same in every process: any part of a sorted folder is mixed.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgeon.analysis import example as examples
from surgeon.errors import DataError, ModelError
from surgeon.files import architectures
from surgeon.files.names import Trust
from surgeon.fitting import labels as label
from surgeon.fitting import pictures, stored
from surgeon.fitting import preprocess as ways
from surgeon.fitting.loaders import Loader, Stream
from surgeon.fitting.supply import Batch, Images, Picked, Supply
from surgeon.models.call import Inputs
from surgeon.models.sandbox import quietly

__all__ = ["BATCH", "Batch", "Data", "of", "read"]

BATCH = 64  # images at once, unless the user says otherwise
_NOISE = 256  # images, unless the user says how many
_IMAGES = ("images", "image", "x", "data")
_log = logging.getLogger("surgeon")
_FUNCTION = re.compile(r"[^:]+(\.py)?:[^\W\d][\w.]*")
_SOURCES = f"Give a folder of pictures, a {', '.join(stored.SUFFIXES)}, file.py:loader, or noise."
_FOUR = "Give an array (images, channels, height, width); one of several is named like this: x.npz:train_x"


@dataclass(frozen=True, slots=True)
class Data:
    """Batches of images, the same numbers in the same order at every pass and in every process.

    `source` is what the user wrote, `preprocessing` says in a sentence what was done to the images and who says so.

    >>> import torch
    >>> data = of(torch.rand(10, 3, 8, 8), batch=4)
    >>> [batch.count for batch in data], data.share(rank=1, count=2).images
    ([4, 4, 2], 4)
    """

    source: str
    preprocessing: str
    supply: Supply

    @property
    def images(self) -> int:
        return sum(self.supply.counts)

    @property
    def has_labels(self) -> bool:
        return self.supply.has_labels

    @property
    def digest(self) -> str:
        """A sha256 of the numbers in their source, of what is done to them, of their order and of their batches."""
        return self.supply.digest

    def __len__(self) -> int:
        return len(self.supply.counts)

    def __iter__(self) -> Iterator[Batch]:
        return self.supply.give(0)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Give the batches from one on, as a pass that was interrupted goes on."""
        return self.supply.give(start)

    def share(self, rank: int, count: int) -> Data:
        """Give the part of one of several processes: the batches i with i % count == rank."""
        return self._with(self.supply.only(range(rank, len(self), count)))

    def first(self, images: int) -> Data:
        """Give so many images or a little more, in whole batches, and two batches at least where there are two."""
        enough = next((i + 1 for i in range(len(self)) if sum(self.supply.counts[: i + 1]) >= images), len(self))
        return self._with(self.supply.only(range(min(len(self), max(2, enough)))))

    def held_back(self, count: int, seed: int) -> tuple[Data, Data]:
        """Put images aside, seeded: the rest, and these. Of a loader, whole batches until there are so many.

        Raises:
            DataError: nothing would be left.
        """
        rest, held = self.supply.held_back(count, seed)
        return self._with(rest), self._with(held)

    def _with(self, supply: Supply) -> Data:
        return Data(self.source, self.preprocessing, supply)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the user asks of a source."""

    source: str
    model: nn.Module | None
    batch: int | None
    images: int | None
    preprocess: str | None
    labels: Any
    seed: int
    trust: Trust
    example: Inputs | None

    @property
    def size(self) -> int:
        return BATCH if self.batch is None else self.batch

    @property
    def wants_own(self) -> bool:
        """Whether labels are those of the source; an array of numbers is equal to no text."""
        return isinstance(self.labels, str) and self.labels == label.OWN

    def found(self) -> ways.Preprocessing:
        return ways.known(self.model, self.preprocess, example=self.example)


def read(
    source: str | Path,
    model: nn.Module | None = None,
    *,
    batch: int | None = None,
    images: int | None = None,
    preprocess: str | None = None,
    labels: Any = None,
    seed: int = 0,
    trust: Trust = Trust(),  # noqa: B008 - frozen
    example: Inputs | None = None,
) -> Data:
    """Read the images that the user names for a model; `example` is an input that it is known to take.

    `images` takes the first ones of a seeded permutation, or of a loader. `labels` is None for none, "own" for those
    that the source has, or a file.

    Raises:
        DataError: there is no such source, or what is in it cannot be used.
    """
    text = str(source)
    asked = _Asked(text, model, batch, images, preprocess, labels, seed, trust, example)
    _check_counts(asked)
    if re.fullmatch(r"noise(:[1-9]\d*)?", text):
        return _noise(asked)
    path, _, key = text.rpartition(":")
    if Path(text).is_dir():
        return _folder(asked)
    if Path(text).suffix.lower() in stored.SUFFIXES:
        return _arrays(asked, stored.arrays(Path(text), trust), None)
    if Path(path).suffix.lower() in stored.SUFFIXES:
        return _arrays(asked, stored.arrays(Path(path), trust), key)
    if not Path(text).exists() and _FUNCTION.fullmatch(text):
        return _function(asked)
    what = "is none of these" if Path(text).exists() else "is not there"
    raise DataError(f"the source of images {text} {what}", todo=_SOURCES)


def of(
    given: Any,
    model: nn.Module | None = None,
    *,
    batch: int | None = None,
    images: int | None = None,
    preprocess: str | None = None,
    labels: Any = None,
    seed: int = 0,
    trust: Trust = Trust(),  # noqa: B008 - frozen
    example: Inputs | None = None,
) -> Data:
    """Make data of what a Python user gives: a tensor, an array, (images, labels), batches, a function, or a source.

    Raises:
        DataError: it cannot be used.
    """
    if isinstance(given, str | Path):
        options: dict[str, Any] = {"batch": batch, "images": images, "preprocess": preprocess, "labels": labels}
        return read(given, model, **options, seed=seed, trust=trust, example=example)
    asked = _Asked(f"a {type(given).__name__}", model, batch, images, preprocess, labels, seed, trust, example)
    _check_counts(asked)
    if isinstance(given, Data):
        if any(value is not None for value in (batch, images, preprocess, labels)):
            raise DataError("these images are read already", todo="Give batch, images, labels when they are read.")
        return given
    return _python(asked, given)


def _python(asked: _Asked, given: Any) -> Data:
    """Tell arrays from what yields batches."""
    if isinstance(given, Mapping):
        named = {str(name): array for name, value in given.items() if (array := stored.in_memory(value)) is not None}
        return _arrays(asked, named, None)
    arrays = {"images": stored.in_memory(given)}
    if isinstance(given, tuple) and len(given) == 2:
        arrays = {"images": stored.in_memory(given[0]), "labels": stored.in_memory(given[1])}
        if arrays["labels"] is not None and len(arrays["labels"].shape) > 2:
            arrays = {}
    read_ = {name: array for name, array in arrays.items() if array is not None}
    if arrays and "images" in read_ and len(read_) == len(arrays):
        return _arrays(asked, read_, "images")
    if isinstance(given, Iterator):
        raise DataError(
            f"{asked.source} can be iterated only once, and fitting needs several passes",
            todo="Give a list of batches, a DataLoader, or the function that makes it.",
        )
    if callable(given) and not isinstance(given, Iterable):
        return _loader(asked, Loader(getattr(given, "__name__", asked.source), given, asked.seed))
    return _loader(asked, Loader(asked.source, lambda: given, asked.seed))


def _check_counts(asked: _Asked) -> None:
    for name, value in (("batch", asked.batch), ("images", asked.images)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", todo="Give 1 or more.")


def _folder(asked: _Asked) -> Data:
    folder, done = Path(asked.source), asked.found()
    images = pictures.Pictures.below(folder, done)
    if asked.wants_own:
        labels, classes = label.of_folders([*images.paths], folder)
        listed = ", ".join(f"{name} = {i}" for i, name in enumerate(classes[:10]))
        said = f"; classes are the sub-folders in sorted order: {listed}{', …' if len(classes) > 10 else ''}"
        return _picked(asked, images, labels, f"pictures {done}", said)
    return _picked(asked, images, _given_labels(asked, len(images)), f"pictures {done}")


def _arrays(asked: _Asked, arrays: Mapping[str, stored.Array], key: str | None) -> Data:
    name = _key_of_images(asked, arrays, key)
    array = arrays[name]
    if not array.shape[0] or 0 in array.shape:
        raise DataError(f"{asked.source} holds no image: {array}", todo=_FOUR)
    rows = _rows(asked, array)
    if asked.wants_own:
        others = {other: one for other, one in arrays.items() if other != name}
        labels: Tensor | None = label.beside(others, len(rows), asked.source)
    else:
        labels = _given_labels(asked, len(rows))
    return _picked(asked, rows, labels, _said_of_rows(rows, name))


def _key_of_images(asked: _Asked, arrays: Mapping[str, stored.Array], key: str | None) -> str:
    """Find which array holds the images: the one that is named, the only one of four axes, or by its name."""
    if key is not None and key not in arrays:
        raise DataError(f"{asked.source}: there is no array '{key}'", todo=f"There are {', '.join(arrays)}.")
    found = [key] if key is not None else [name for name, array in arrays.items() if len(array.shape) == 4]
    if not found:  # greyscale bytes may have no axis of channels
        found = [name for name, array in arrays.items() if len(array.shape) == 3 and array.dtype == "uint8"]
    chosen = found if len(found) == 1 else [name for name in found if name.lower() in _IMAGES]
    if len(chosen) != 1:
        listed = "; ".join(f"{name or 'the array'}: {array}" for name, array in arrays.items())
        what = "several arrays that may be the images" if found else "no array of images"
        raise DataError(f"{asked.source} holds {what} ({listed[:300]})", todo=_FOUR)
    return chosen[0]


def _rows(asked: _Asked, array: stored.Array) -> pictures.Rows:
    """Say how the rows of an array are read: which axis has the channels, and whether they are bytes."""
    if len(array.shape) != 4 and not (len(array.shape) == 3 and array.dtype == "uint8"):
        raise DataError(f"{asked.source} is {array}, not images", todo=_FOUR)
    if array.dtype != "uint8":
        return _floats(asked, array)
    done = asked.found()
    if len(array.shape) == 3:
        if done.channels not in (None, 1):
            raise DataError(f"{asked.source} is {array}, and the network takes {done.channels} channels", todo=_FOUR)
        return pictures.Rows(array, done, is_flat=True)
    fits = (done.channels,) if done.channels not in (None, 1, 3) else (1, 3)
    is_last = array.shape[1] not in fits and array.shape[3] in fits
    rows = pictures.Rows(array, done, is_last)
    if rows.channels not in fits:
        wanted = " or ".join(map(str, fits))
        raise DataError(f"{asked.source} has {rows.channels} channels ({array}), and needs {wanted}", todo=_FOUR)
    if rows.is_resized:
        ways.check_takes_pictures(done)
        with stored.readable(Path(asked.source)):
            import PIL  # noqa: F401 - so that it is missed here, with a sentence that says so
    return rows


def _floats(asked: _Asked, array: stored.Array) -> pictures.Rows:
    if not array.is_floating:
        todo = "Save bytes (uint8), which are made what the model takes, or floats, which are taken as they are."
        raise DataError(f"{asked.source} holds {array}, neither bytes nor floats", todo=todo)
    if asked.preprocess is not None:
        todo = "Leave --preprocess out, or give bytes (uint8)."
        raise DataError(f"{asked.source} holds floats, which are taken as already preprocessed", todo=todo)
    channels = ways.channels_of(asked.model, asked.example)
    if channels is not None and array.shape[1] != channels == array.shape[3]:
        todo = "Transpose it to (images, channels, height, width)."
        raise DataError(f"{asked.source} holds {array}: the channels are its last axis", todo=todo)
    return pictures.Rows(array, None)


def _said_of_rows(rows: pictures.Rows, name: str) -> str:
    which = f"the array '{name}'" if name not in ("", "images") else "the array"
    if rows.done is None:
        return f"{which} taken as it is: floats count as already preprocessed"
    order = ", channels last" if rows.is_last else ", without an axis of channels" if rows.is_flat else ""
    return f"{which} of bytes{order}, {rows.done if rows.is_resized else rows.done.of_bytes}"


def _picked(asked: _Asked, images: Images, labels: Tensor | None, done: str, said: str = "") -> Data:
    supply = Picked.of(images, labels, size=asked.size, limit=asked.images, seed=asked.seed, done=done)
    taken = min(asked.images or len(images), len(images))
    share = f"{taken:,} of {len(images):,} images" if taken < len(images) else f"{taken:,} images"
    many = f"{share} in the order of seed {asked.seed}, {asked.size} at once"
    return Data(asked.source, f"{many}: {done}{said}", supply)


def _given_labels(asked: _Asked, count: int) -> Tensor | None:
    return None if asked.labels is None else label.given(asked.labels, count, asked.trust)


def _function(asked: _Asked) -> Data:
    """Call the user's function; what it gives is arrays, or yields batches."""
    try:
        function = architectures.find(asked.source)
    except ModelError as error:
        raise DataError(f"{asked.source}: {error.problem}", todo=error.todo) from error
    loader = Loader(asked.source, function, asked.seed)
    made = loader.made()
    if isinstance(made, Data):
        return of(made, batch=asked.batch, images=asked.images, preprocess=asked.preprocess, labels=asked.labels)
    if stored.in_memory(made) is not None:
        return _python(asked, made)
    return _loader(asked, loader)


def _loader(asked: _Asked, loader: Loader) -> Data:
    if asked.batch is not None or asked.preprocess is not None:
        option = "--batch" if asked.batch is not None else "--preprocess"
        todo = f"Leave {option} out, and do it in the loader."
        raise DataError(f"{loader.name} makes its own batches, which are taken as they are", todo=todo)
    loader.takes = _names_taken(asked.model)
    done = "taken as the loader gives them, as already preprocessed"
    stream = Stream.read(loader, limit=asked.images, wants_own=asked.wants_own, done=done)
    count = sum(stream.counts)
    if asked.labels is not None and not asked.wants_own:
        has_limit = asked.images is not None
        stream = stream.labelled(label.given(asked.labels, count, asked.trust, at_least=has_limit))
    first = "the first " if asked.images is not None else ""
    return Data(asked.source, f"{first}{count:,} images in {len(stream.counts):,} batches, {done}", stream)


def _names_taken(model: nn.Module | None) -> tuple[str, ...] | None:
    """Name what a model takes; None where it takes any name, or that is not known."""
    if model is None:
        return None
    parameters = inspect.signature(model.forward).parameters
    is_open = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return None if is_open else tuple(parameters)


def _noise(asked: _Asked) -> Data:
    if asked.labels is not None or asked.preprocess is not None:
        raise DataError("noise has neither labels nor preprocessing", todo="Leave them out, or give real images.")
    count = int(asked.source.partition(":")[2] or _NOISE)
    like = asked.example
    if like is None and asked.model is not None:
        with quietly(asked.seed):
            like = examples.guess(asked.model, seed=asked.seed)
    if like is None or len(like.tensors) != 1 or like.tensors[0].dim() != 4:
        todo = "Give an example input, --input 1,3,224,224, or better real images."
        raise DataError("which shape noise should have is not known for this network", todo=todo)
    _log.warning(
        "noise is a bad idea: its statistics are not those of images, so a network fitted to it is right for noise "
        "and not for images; any hundred unlabelled images are better"
    )
    images = pictures.Noise(count, tuple(like.tensors[0].shape[1:]), asked.seed)
    shape = "×".join(map(str, images.shape))
    return _picked(asked, images, None, f"normal random numbers of {shape}, which are not images")
