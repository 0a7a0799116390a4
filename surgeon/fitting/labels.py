"""Labels: one whole number for each image, from a file, from the source itself, or from a Python user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.files.names import Trust
from surgeon.fitting import stored

NAMES = ("labels", "label", "targets", "target", "classes", "y")
OWN = "own"
_SUFFIXES = (".txt", *stored.SUFFIXES)
_WHAT = f"Give the word own, for those of the source, or a file: {', '.join(_SUFFIXES)}."
_TODO = "Give one whole number, 0 or more, for each image in the order of the source."


def given(labels: Any, count: int, trust: Trust, *, at_least: bool = False) -> Tensor:
    """Read labels from a file, or take the numbers of a Python user; `at_least` lets there be more of them.

    Raises:
        DataError: they cannot be read, are not whole, or not as many as there are images.
    """
    if isinstance(labels, str | Path):
        values = _read(Path(labels), trust)
    else:
        array = stored.in_memory(labels)
        try:
            values = torch.tensor(labels) if array is None else array.rows(range(array.shape[0] if array.shape else 0))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"labels cannot be made of a {type(labels).__name__}", todo=_TODO) from error
    return checked(values, count, at_least=at_least)


def checked(values: Tensor, count: int, *, at_least: bool = False) -> Tensor:
    """Turn labels into int64, if they are whole numbers and as many as there are images."""
    values = values.detach().cpu()
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1:
        raise DataError(f"labels of shape {'×'.join(map(str, values.shape))} are not one for each image", todo=_TODO)
    if len(values) != count and not (at_least and len(values) > count):
        raise DataError(f"there are {len(values)} labels for {count} images", todo=_TODO)
    if values.is_complex() or values.dtype == torch.bool:
        raise DataError(f"labels of {values.dtype} are not whole numbers", todo=_TODO)
    wrong = (values < 0) | (values != values.to(torch.int64))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(f"label {at} (counted from 0) is {values[at].item():g}", todo=_TODO)
    return values.to(torch.int64)


def beside(arrays: Mapping[str, stored.Array], count: int, source: str) -> Tensor:
    """Find the labels among the arrays of the file that holds the images.

    Raises:
        DataError: there are none, or several.
    """
    found = {
        name: array
        for name, array in arrays.items()
        if array.is_whole and array.shape in ((count,), (count, 1))  # (n, 1) is what some data sets have
    }
    chosen = list(found) if len(found) == 1 else [name for name in found if name.lower() in NAMES]
    if len(chosen) != 1:
        what = f"several arrays that may be labels: {', '.join(found)}" if found else "no labels of its own"
        raise DataError(f"{source} has {what}", todo="Give the labels in a file of their own: --labels labels.npy")
    return checked(found[chosen[0]].rows(range(count)), count)


def of_folders(paths: list[Path], root: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Number the sub-folders that pictures lie in, in sorted order: the labels, and the names of the folders.

    Raises:
        DataError: a picture lies in no sub-folder, or there is only one.
    """
    parts = [path.relative_to(root).parts for path in paths]
    if outside := next((path for path, part in zip(paths, parts, strict=True) if len(part) < 2), None):
        raise DataError(
            f"{outside} lies in no sub-folder, and sub-folders are the classes of a folder of pictures",
            todo="Move it into the folder of its class, or give the labels in a file: --labels labels.txt",
        )
    classes = sorted({part[0] for part in parts})
    if len(classes) < 2:
        raise DataError(
            f"{root} has one sub-folder, which would be the only class", todo="Give the labels in a file instead."
        )
    return torch.tensor([classes.index(part[0]) for part in parts]), tuple(classes)


def _read(path: Path, trust: Trust) -> Tensor:
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(
            f"--labels {path} is not a file of labels",
            todo=_WHAT,
        )
    if not path.is_file():
        raise DataError(
            f"there is no file of labels {path}",
            todo=_WHAT,
        )
    if path.suffix.lower() == ".txt":
        return _text(path)
    found = stored.arrays(path, trust)
    if len(found) > 1:
        found = {name: array for name, array in found.items() if name.lower() in NAMES}
    if len(found) != 1:
        raise DataError(f"{path} does not show which of its arrays are the labels", todo="Call one of them labels.")
    (array,) = found.values()
    if not array.shape or not (array.is_whole or array.is_floating):
        raise DataError(f"{path} holds {array}, which are not labels", todo=_TODO)
    with stored.readable(path):
        return array.rows(range(array.shape[0]))


def _text(path: Path) -> Tensor:
    with stored.readable(path):
        words = path.read_text(encoding="utf-8").split()
    for at, word in enumerate(words):
        if not word.isdecimal():
            raise DataError(f"{path}: label {at} (counted from 0) is {word[:40]!r}", todo=_TODO)
    with stored.readable(path):
        return torch.tensor([int(word) for word in words], dtype=torch.int64)
