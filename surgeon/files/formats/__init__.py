"""The file formats: every subclass of `Format` in this folder, and which of them a file is written in."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

from surgeon.errors import ModelError
from surgeon.files.faults import compiled, missing
from surgeon.files.formats.base import Format

__all__ = ["Format", "known", "of_file", "of_suffix", "suffixes"]

_HEAD = 64  # bytes, which are enough to tell any format


@cache
def known() -> tuple[Format, ...]:
    """Find every format in this folder, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    kinds = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    formats: list[Format] = [kind() for kind in kinds if issubclass(kind, Format) and not inspect.isabstract(kind)]
    return tuple(sorted(formats, key=lambda one: one.name))


def suffixes() -> tuple[str, ...]:
    """Give the suffixes that a model can be written with."""
    return tuple(suffix for one in known() for suffix in one.suffixes)


def of_suffix(path: Path) -> Format:
    """Give the format that a file is to be written in."""
    return next(one for one in known() if path.suffix in one.suffixes)


def of_file(path: Path) -> Format:
    """Tell the format of a file by its first bytes.

    Raises:
        ModelError: it is not there, cannot be read, or holds no module and no tensors that surgeon could read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", todo="Name a file that you may read.") from error
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself", todo="Run `git lfs pull`.")
    likely = (*(one for one in known() if one.knows(path, head)), *(one for one in known() if one.claims(path)))
    if head and likely:
        return likely[0]
    if path.suffix == ".onnx":
        raise compiled(path, "an ONNX graph")
    names = " and ".join(one.name for one in reversed(known()))
    raise ModelError(
        f"{path} {'is not a model file that surgeon knows' if head else 'is empty'}", todo=f"surgeon reads {names}."
    )
