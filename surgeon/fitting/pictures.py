"""Images that can be asked for by their numbers: folders of pictures, arrays, and random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.fitting import stored
from surgeon.fitting.preprocess import Preprocessing, check_depth, check_takes_pictures
from surgeon.fitting.supply import Colours, Hash, Images, add_to
from surgeon.models.call import Inputs

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_AT_ONCE = 64  # images of an array that are looked at together


@dataclass(frozen=True, slots=True)
class Pictures(Images):
    """The pictures of a folder, sorted by path."""

    paths: tuple[Path, ...]
    done: Preprocessing

    @classmethod
    def below(cls, folder: Path, done: Preprocessing) -> Pictures:
        """List the pictures of a folder, at any depth; files and folders whose name begins with a dot are hidden.

        Raises:
            DataError: there is none, or Pillow is missing.
        """
        check_takes_pictures(done)
        with stored.readable(folder):
            import PIL  # noqa: F401 - so that it is missed here, with a sentence that says so

            named = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
            shown = (path for path in named if not any(p.startswith(".") for p in path.relative_to(folder).parts))
            files = sorted(path for path in shown if path.is_file())
        if not files:
            raise DataError(f"{folder} holds no pictures", todo=f"Name a folder with {', '.join(SUFFIXES)} in it.")
        return cls(tuple(files), done)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, numbers: Sequence[int]) -> Inputs:
        images = [self._image(self.paths[number]) for number in numbers]
        return Inputs((images,) if self.done.is_detector else (torch.stack(images),))

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def examine(self, numbers: Sequence[int], digest: Hash) -> None:
        """Decode every picture once: one that is damaged is found before anything is computed."""
        from_first: dict[tuple[int, int], Path] = {}
        colours = Colours()
        for path in (self.paths[number] for number in numbers):
            from_first.setdefault(self._head(path, digest), path)
            if self.done.size is None and not self.done.is_detector and len(from_first) > 1:
                said = " and ".join(f"{one} ({size[0]}×{size[1]})" for size, one in from_first.items())
                raise DataError(
                    f"pictures are not of one size: {said}",
                    todo="Give a size: --preprocess size=64, or imagenet; or an example input: --input 1,3,224,224.",
                )
            colours.see(self._image(path), 0)
        colours.check()

    def _head(self, path: Path, digest: Hash) -> tuple[int, int]:

        with stored.readable(path):
            content = path.read_bytes()
            with _opened(path, content) as picture:
                check_depth(picture, str(path))
                size = picture.size
        digest.update(hashlib.sha256(content).digest())
        return size[1], size[0]

    def _image(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        with stored.readable(path), Image.open(path) as file:
            return self.done.tensor(ImageOps.exif_transpose(file))


@contextmanager
def _opened(path: Path, content: bytes) -> Iterator[Any]:
    """Open a picture; Pillow would name the bytes, not the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(BytesIO(content))
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} cannot be read: it is no picture that Pillow knows", todo="Write it again, or move it away."
        ) from error
    with picture:
        yield picture


@dataclass(frozen=True, slots=True)
class Rows(Images):
    """The rows of an array: bytes are made what the model takes, floats are taken as they are."""

    array: stored.Array
    done: Preprocessing | None  # None: they are floats
    is_last: bool = False  # channels are the last axis
    is_flat: bool = False  # there is no axis of channels

    def __len__(self) -> int:
        return self.array.shape[0]

    @property
    def channels(self) -> int:
        return 1 if self.is_flat else self.array.shape[3 if self.is_last else 1]

    @property
    def is_resized(self) -> bool:
        """Whether every image goes through Pillow, since the user has named another size or the colours differ."""
        if self.done is None:
            return False
        shape = self.array.shape
        size = shape[1:] if self.is_flat else shape[1:3] if self.is_last else shape[2:]
        is_other_size = self.done.size_is_given and self.done.size != size
        return is_other_size or self.done.channels not in (None, self.channels)

    def take(self, numbers: Sequence[int]) -> Inputs:
        rows = self.array.rows(numbers)
        if self.done is None:
            return Inputs((rows,))
        if self.is_flat:
            rows = rows[:, None]
        elif self.is_last:
            rows = rows.permute(0, 3, 1, 2).contiguous()
        images = torch.stack([self._pictured(row) for row in rows]) if self.is_resized else self.done.normalised(rows)
        return Inputs((list(images),) if self.done.is_detector else (images,))

    def examine(self, numbers: Sequence[int], digest: Hash) -> None:
        colours, axis = Colours(), 3 if self.is_last else 0 if self.is_flat else 1
        for i in range(0, len(numbers), _AT_ONCE):
            part = numbers[i : i + _AT_ONCE]
            rows = self.array.rows(part)
            add_to(digest, rows)
            if self.done is None and not torch.isfinite(rows).all():
                bad = next(number for number, row in zip(part, rows, strict=True) if not torch.isfinite(row).all())
                raise DataError(
                    f"image {bad} (counted from 0) holds NaN or infinite numbers", todo="Leave it out, or mend it."
                )
            colours.see(rows[None] if self.is_flat else rows, axis)
        colours.check()

    def _pictured(self, row: Tensor) -> Tensor:
        """Take an image of bytes (channels, height, width) through Pillow."""
        from PIL import Image

        assert self.done is not None
        height, width = row.shape[1:]
        pixels = row.permute(1, 2, 0).contiguous()
        content = bytes(pixels.flatten().tolist())
        return self.done.tensor(Image.frombytes("L" if row.shape[0] == 1 else "RGB", (width, height), content))


@dataclass(frozen=True, slots=True)
class Noise(Images):
    """Normal random numbers of one shape: every image is drawn from a seed of its own."""

    count: int
    shape: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        return self.count

    def take(self, numbers: Sequence[int]) -> Inputs:
        return Inputs((torch.stack([self._drawn(number) for number in numbers]),))

    def examine(self, numbers: Sequence[int], digest: Hash) -> None:
        digest.update(f"noise {self.shape} {self.seed} {list(numbers)}".encode())

    def _drawn(self, number: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:7], "big")
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
