"""Arrays as they lie in files, which are read row by row: .npy, .npz, .safetensors, and what torch.save wrote.

A .npy is mapped into memory, a .safetensors read where it is asked for; an array of a .npz is unpacked once, and a
file of torch.save is read as a whole, by surgeon's own reader, which runs nothing of it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from surgeon.errors import DataError, ModelError
from surgeon.files import formats
from surgeon.files.names import Trust
from surgeon.models.copies import where
from surgeon.models.draw import FLOATS, WHOLES, dtype_name

SUFFIXES = (".npz", ".npy", ".safetensors", ".pt", ".pth")
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I8": "int8"}
_SAFETENSORS |= {"I16": "int16", "I32": "int32", "I64": "int64"}


@dataclass(frozen=True, slots=True)
class Array:
    """One array: its shape, the name of its dtype, and the function that reads rows of it."""

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[Sequence[int]], Tensor]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATS and not self.dtype.startswith("complex")

    @property
    def is_whole(self) -> bool:
        return self.dtype in WHOLES

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape)) or 'one number'} of {self.dtype}"


def arrays(path: Path, trust: Trust) -> dict[str, Array]:
    """List the arrays of a file by their names; one that stands alone has none.

    Raises:
        DataError: the file cannot be read, or holds no arrays.
    """
    read = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}.get(path.suffix.lower(), partial(_pt, trust))
    with readable(path):
        found = read(path)
    if not found:
        raise DataError(f"{path} holds no arrays", todo="Give images as one array (images, channels, height, width).")
    return found


def in_memory(value: Any) -> Array | None:
    """Take a tensor, or an array of NumPy; None for anything else."""
    if isinstance(value, Tensor):
        return Array(tuple(value.shape), dtype_name(value.dtype), lambda rows: value.detach()[list(rows)])
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype"):
        return _of_numpy(value)
    return None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is a DataError that names it."""
    try:
        yield
    except ModelError as error:
        raise DataError(error.problem, todo=error.todo) from error
    except ImportError as error:
        package = {"PIL": "pillow"}.get(str(error.name), str(error.name))
        raise DataError(f"{path} cannot be read without {package}", todo=f"pip install {package}") from error
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}", todo="Name a file that exists.") from error
    except DataError:
        raise
    except Exception as error:  # Pillow, zlib, struct and NumPy have errors of many kinds for damaged files
        raise DataError(f"{path} cannot be read: {where(error)}", todo="Copy or write it again.") from error


def _npy(path: Path) -> dict[str, Array]:
    import numpy

    return {"": _of_numpy(numpy.load(path, mmap_mode="r", allow_pickle=False))}


def _of_numpy(array: Any) -> Array:
    """Read rows of an array in the byte order of this machine."""

    def rows(numbers: Sequence[int]) -> Tensor:
        taken = array[list(numbers)]
        return torch.from_numpy(taken.astype(taken.dtype.newbyteorder("="), copy=True))

    return Array(tuple(array.shape), array.dtype.name, rows)


def _npz(path: Path) -> dict[str, Array]:
    """Read the heads of all arrays; each is unpacked when its first row is asked for, and once."""
    with zipfile.ZipFile(path) as archive:
        members = [one for one in archive.namelist() if one.endswith(".npy")]
        heads = {member.removesuffix(".npy"): _head(archive, member) for member in members}
    return {name: Array(shape, dtype, _rows_of_member(path, name)) for name, (shape, dtype) in heads.items()}


def _head(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], str]:
    from numpy.lib import format as layout

    with archive.open(member) as file:
        old = layout.read_magic(file) == (1, 0)
        shape, _, dtype = (layout.read_array_header_1_0 if old else layout.read_array_header_2_0)(file)
    return tuple(shape), dtype.name


def _rows_of_member(path: Path, name: str) -> Callable[[Sequence[int]], Tensor]:
    @cache
    def unpacked() -> Array:
        import numpy

        with readable(path), numpy.load(path, allow_pickle=False) as archive:
            return _of_numpy(archive[name])

    return lambda numbers: unpacked().rows(numbers)


def _safetensors(path: Path) -> dict[str, Array]:
    formats.of_file(path)  # it says what is wrong with a file that is none
    with safe_open(path, framework="pt") as file:
        heads = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        shapes = {key: (tuple(head.get_shape()), str(head.get_dtype())) for key, head in heads.items()}
    return {
        key: Array(shape, _SAFETENSORS.get(dtype, dtype), partial(_rows_of_safetensors, path, key))
        for key, (shape, dtype) in shapes.items()
    }


def _rows_of_safetensors(path: Path, key: str, numbers: Sequence[int]) -> Tensor:
    with readable(path), safe_open(path, framework="pt") as file:
        part = file.get_slice(key)
        return torch.stack([part[number : number + 1][0] for number in numbers])


def _pt(trust: Trust, path: Path) -> dict[str, Array]:
    found = formats.of_file(path).read(path, trust)
    if isinstance(found, tuple | list):
        found = {str(i): value for i, value in enumerate(found)}
    named = found if isinstance(found, Mapping) else {"": found}
    read = {str(name): in_memory(value) for name, value in named.items()}
    return {name: array for name, array in read.items() if array is not None}
