"""Whole files or none: names are checked before any work is done, and a file takes its place when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from surgeon.errors import StoreError


def claim(path: Path, *, force: bool, suffixes: Sequence[str], origin: str | None = None) -> Path:
    """Make sure, before any work is done, that a file may be written; `origin` is what it is made from.

    Raises:
        StoreError: it exists and `force` was not given, or it is its own origin; its folder does not exist, or its
            suffix is none of `suffixes`.
    """
    if origin is not None and path.resolve() == Path(origin).resolve():
        raise StoreError(f"{path} is the model that this is made from", todo="Give another name with -o.")
    if path.is_dir():
        raise StoreError(f"{path} is a directory", todo="Name a file: -o model.acnet.pt.")
    if path.suffix not in suffixes:
        raise StoreError(f"cannot tell from {path.name!r} what to write", todo=f"End it in {', '.join(suffixes)}.")
    if path.exists() and not force:
        raise StoreError(f"{path} exists", todo="Give another name with -o, or --force to overwrite it.")
    if not path.parent.is_dir():
        raise StoreError(f"there is no folder {path.parent}", todo="Make it first.")
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, which then takes its place; a reader sees the old or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"cannot write {path}: {reason}", todo="Nothing was written there.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
