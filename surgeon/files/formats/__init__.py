"""The file formats: every subclass of `Format` in this folder, and which of them a file is written in."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import stat
from functools import cache
from pathlib import Path

from surgeon.errors import ModelError
from surgeon.files.faults import compiled, folder, missing, no_file, part_of, source_code
from surgeon.files.formats.base import Format

__all__ = ["Format", "check_file", "known", "of_file", "of_suffix", "suffixes"]

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


def check_file(path: Path) -> bytes:
    """Make sure that a name is that of a file that can be read, and give its first bytes.

    Raises:
        ModelError: it is not there, no file, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise folder(path)
        if not stat.S_ISREG(mode):
            raise no_file(path, mode)
        with path.open("rb") as file:
            return file.read(_HEAD)
    except FileNotFoundError as error:
        raise missing(path) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {why}", todo="Name a file that you may read.") from error


def of_file(path: Path) -> Format:
    """Tell the format of a file by its first bytes.

    Raises:
        ModelError: it is not there, cannot be read, or holds no module and no tensors that surgeon could read.
    """
    head = check_file(path)
    if part := part_of(path, head):
        raise part
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself", todo="Run `git lfs pull`.")
    likely = (*(one for one in known() if one.knows(path, head)), *(one for one in known() if one.claims(path)))
    if head and likely:
        return likely[0]
    if path.suffix == ".py":
        raise source_code(path)
    if path.suffix == ".onnx":
        raise compiled(path, "an ONNX graph")
    names = " and ".join(one.name for one in reversed(known()))
    raise ModelError(
        f"{path} {'is not a model file that surgeon knows' if head else 'is empty'}", todo=f"surgeon reads {names}."
    )
