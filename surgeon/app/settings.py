"""Standing choices, so that an option need not be given each time: which packages a pickle may name, and the device.

    $ export SURGEON_ALLOW=mypackage,other SURGEON_DEVICE=cuda

    [tool.surgeon]                  # in the nearest pyproject.toml, from the current folder up
    allow = ["mypackage"]
    device = "cuda"

For each of them the first that says anything counts: the command line, the environment, pyproject.toml.

A pyproject.toml may have come with a folder that was downloaded, next to a model file and to the code that it names. So
what it allows is less than what the user says: a package that is installed, not one that is found only because the
current folder is searched too; and only if no other user could have put the file there.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
import re
import stat
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from surgeon.errors import Fault, RecipeError, StoreError
from surgeon.recipes import forms
from surgeon.recipes.forms import Form
from surgeon.recipes.marks import Marked, Place

_log = logging.getLogger("surgeon")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_FILE = "pyproject.toml"


def _package(name: str) -> str:
    if not _DOTTED.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a package")
    return name


class Settings(Form):
    """The table [tool.surgeon]; None where it says nothing."""

    allow: Annotated[tuple[Annotated[str, AfterValidator(_package)], ...] | None, Field(strict=False)] = None
    device: Annotated[str, Field(strict=True, min_length=1)] | None = None


def allowed(given: Sequence[str] | None) -> tuple[str, ...]:
    """Say which packages a pickle may name, from what --allow gives and the standing choices.

    Raises:
        RecipeError, StoreError: the environment or pyproject.toml cannot be used.
    """
    if given:
        return tuple(given)
    if (text := os.environ.get("SURGEON_ALLOW")) is not None:
        names = [name.strip() for name in text.split(",") if name.strip()]
        return _checked({"allow": names}, "SURGEON_ALLOW").allow or ()
    path = _nearest()
    wanted = _in_file(path).allow if path is not None else None
    if path is None or not wanted:
        return ()
    if _others_may_write(path):
        _log.warning(f"{path} is not yours alone, so what it allows does not count; pass --allow {wanted[0]}")
        return ()
    for name in wanted:
        if not _is_installed(name):
            _log.warning(f"{path} allows {name}, which is not installed, so that does not count; pass --allow {name}")
    admitted = tuple(name for name in wanted if _is_installed(name))
    if admitted:
        _log.info(f"{path} allows {', '.join(admitted)}")
    return admitted


def device(given: str | None) -> str:
    """Say where to run models, from what --device gives and the standing choices; on the CPU if nothing is said."""
    if given is not None:
        return given
    if text := os.environ.get("SURGEON_DEVICE", "").strip():
        return text
    path = _nearest()
    return (_in_file(path).device if path is not None else None) or "cpu"


def _nearest() -> Path | None:
    """Find pyproject.toml in the current folder, or in the nearest one above it."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return None
    return next((folder / _FILE for folder in (here, *here.parents) if (folder / _FILE).is_file()), None)


def _in_file(path: Path) -> Settings:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", todo="Make it readable.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nested too deep
        raise StoreError(f"{path} is not TOML: {error}", todo="Mend it; surgeon reads [tool.surgeon] in it.") from error
    tool = data.get("tool", {})
    found = tool.get("surgeon", {}) if isinstance(tool, dict) else {}
    return _checked(found, f"{path}: [tool.surgeon]")


def _checked(data: Any, where: str) -> Settings:
    """Check what was found; keys that are not known are errors."""
    if not isinstance(data, Mapping):
        raise RecipeError([Fault(where, "", "is not a table")], todo="Write [tool.surgeon] and its keys below it.")
    place = Place(0, 0, where)
    paths = [(), *((key,) for key in data)]
    marked = Marked(dict(data), dict.fromkeys(paths, place), dict.fromkeys(paths, place))
    return forms.validate(Settings, marked, todo='The keys are `allow = ["mypackage"]` and `device = "cuda"`.')


def _others_may_write(path: Path) -> bool:
    """Whether another user owns a file, or may change it."""
    if not hasattr(os, "getuid"):
        return False
    status = path.stat()
    return status.st_uid not in (0, os.getuid()) or bool(status.st_mode & stat.S_IWOTH)


def _is_installed(name: str) -> bool:
    """Whether a package is found without the current folder, and is the one that would be imported."""
    top = name.partition(".")[0]
    searched = list(sys.path)
    if searched and not sys.flags.safe_path and Path(searched[0]).resolve() == Path.cwd():
        del searched[0]  # `python -m surgeon` puts it there
    found = _spec(top, searched)
    first = _spec(top, sys.path)
    return found is not None and found.origin is not None and first is not None and first.origin == found.origin


def _spec(name: str, folders: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Find a module as an import does, in these folders."""
    for finder in sys.meta_path:
        places = folders if finder is importlib.machinery.PathFinder else None
        if (spec := finder.find_spec(name, places)) is not None:
            return spec
    return None
