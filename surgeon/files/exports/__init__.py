"""The exports: every subclass of `Export` in this folder, and which of them a file is.

What they need (`surgeon[onnx]`) is imported when one of them is used, and never before.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

from surgeon.errors import ModelError
from surgeon.files import formats
from surgeon.files.exports.base import Export
from surgeon.files.exports.compiled import Compiled
from surgeon.files.names import Trust

__all__ = ["Compiled", "Export", "is_export", "known", "of_suffix", "open_", "suffixes"]


@cache
def known() -> tuple[Export, ...]:
    """Find every export in this folder, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    kinds = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    found: list[Export] = [kind() for kind in kinds if issubclass(kind, Export) and not inspect.isabstract(kind)]
    return tuple(sorted(found, key=lambda one: one.name))


def suffixes() -> tuple[str, ...]:
    """Give the suffixes of files that hold programs."""
    return tuple(suffix for one in known() for suffix in one.suffixes)


def is_export(name: str | Path) -> bool:
    """Whether a file is called like one that holds a program."""
    return Path(name).suffix in suffixes()


def of_suffix(path: Path) -> Export:
    """Give the export that a file is, or is to be."""
    return next(one for one in known() if path.suffix in one.suffixes)


def open_(path: Path, trust: Trust) -> tuple[Compiled, list[str]]:
    """Open a file that holds a program as a module that runs it, and say what the user has to know.

    Raises:
        ModelError: it cannot be opened; or opening it could run what is in it, and the user has not allowed that.
    """
    kind = of_suffix(path)
    formats.check_file(path)
    notices = []
    if kind.runs_when_opened:
        if not trust.unsafe_pickle:
            raise ModelError(
                f"{path} is {kind.name}, and opening it can run code that is in it",
                todo="Name the nn.Module that it was made from; or, if you trust whoever wrote it, give "
                "--unsafe-pickle (from Python, unsafe_pickle=True), which RUNS what is in the file.",
            )
        notices.append(f"opened {path} without checks (--unsafe-pickle): any code in it may run")
    kind.check()
    return Compiled(kind.open(path)), notices
