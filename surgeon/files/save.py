"""An `nn.Module` → a file, in the format that its suffix names; and what a user has to give to open it again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from surgeon.blocks.sum_of_convs import is_ours
from surgeon.files import formats
from surgeon.files.architectures import Architecture, files_run
from surgeon.files.atomic import claim, write_atomically
from surgeon.files.pickles import PACKAGES, lies_in, offered_blocks
from surgeon.files.written import check_graphs, packages
from surgeon.models import devices
from surgeon.nn import Stored


def save(model: nn.Module, path: Path, *, manifest: str, force: bool = False) -> None:
    """Write a model, from the CPU wherever it lies; `manifest` goes into files that hold tensors only.

    Raises:
        StoreError: the file exists (and `force` is not given), cannot be written, or would hold a program; nothing is
            left behind.
    """
    claim(path, force=force, suffixes=formats.suffixes())
    if formats.of_suffix(path).holds_modules:
        check_graphs(model)
    stored = devices.on(model, devices.CPU)
    write_atomically(path, lambda part: formats.of_suffix(path).write(stored, part, manifest), force=force)


def to_open_again(model: nn.Module, path: Path, architecture: Architecture | None) -> str | None:
    """Say what a user has to give to open a file that was just written, if anything."""
    if not formats.of_suffix(path).holds_modules:
        return f"to open {path} again, name its network with --arch" if architecture is None else None
    kinds = [type(m) for m in reversed(list(model.modules())) if not is_ours(m)]
    foreign = _foreign(kinds)
    of_values = {package for package in packages(model) if package not in foreign}  # of an Enum, a function …
    flags = [_admission(module, kind) for module, kind in sorted(foreign.items())]
    flags += [f"--allow {package}" for package in sorted(of_values)]
    needed = f"to open {path} again, give {' '.join(flags)}" if flags else None
    kept = _foreign([kind for one in kinds if issubclass(one, Stored) and (kind := one.kept_class()) is not None])
    more = {module: kind for module, kind in kept.items() if module not in (*foreign, *of_values, "__main__")}
    if not more:
        return needed
    admitted = " ".join(f"--allow {module}" for module in sorted(more))
    methods = f"with {admitted} it has the methods of {' and '.join(kind.__name__ for kind in more.values())}, too"
    return f"{needed}; {methods}" if needed else f"{path} opens as it is; {methods}"


def _foreign(kinds: Collection[type[nn.Module]]) -> dict[str, type[nn.Module]]:
    """Give those of the classes that only the user can admit, one for each package."""
    blocks = offered_blocks().values()
    return {
        kind.__module__.partition(".")[0]: kind
        for kind in kinds
        if not lies_in(kind.__module__, PACKAGES) and kind not in blocks
    }


def _admission(module: str, kind: type[nn.Module]) -> str:
    """Name the option that lets a pickle hold the modules of a user's own code."""
    file = files_run.get(module)
    if file is None or (Path.cwd() / module).is_dir() or file.parent.resolve() == Path.cwd():
        return f"--allow {module}"
    return f"--arch {file}:{kind.__qualname__}"
