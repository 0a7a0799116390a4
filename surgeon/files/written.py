"""What can be written so that it can be read: asked before the work, and again of the file that was written."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import ModelError, StoreError
from surgeon.files import calls, formats, whole
from surgeon.files.names import HARMLESS, NUMPY, PACKAGES, Trust, lies_in, offered_blocks
from surgeon.files.steps import Program
from surgeon.nn import current_name

_HOOKS = "hooks"
_REGISTERS = ("_parameters", "_buffers", "_modules")


def check_writable(model: nn.Module) -> None:
    """Make sure that a model can be pickled; its tensors are not looked at.

    Raises:
        StoreError: the attribute that cannot be, and what to do.
    """
    if (error := _failure(model)) is None:
        return
    where, what = next(_culprits(model), ("the model", str(error)))
    raise StoreError(
        f"{where} cannot be written to a file: {what}",
        todo="Use a function or class with a name of its own in a module, or remove it; or write only the weights, "
        "-o NAME.safetensors.",
    )


def unreadable(path: Path, trust: Trust) -> str | None:
    """Open a file that was just written with surgeon's own reader; say why it cannot be."""
    try:
        found = formats.of_file(path).read(path, trust)
        if isinstance(found, nn.Module):
            whole.check(found, str(path))
    except ModelError as error:
        return str(error)
    return None


def packages(model: nn.Module) -> set[str]:
    """Name the packages, besides those that are always admitted, that a file of the model names things of."""
    file = io.BytesIO()
    _Probe(file, protocol=2).dump(model)
    own = [name for name in Program(file.getvalue()).names if _needs_admission(current_name(name))]
    return {name.partition(".")[0] for name in own}


def _needs_admission(name: str) -> bool:
    is_known = name in HARMLESS or name in NUMPY or name in offered_blocks()
    return not is_known and not lies_in(name, (*PACKAGES, "torch")) and not calls.is_listed(name)


class _Probe(pickle.Pickler):
    """Pickles as torch.save does, without the numbers."""

    def persistent_id(self, value: object) -> str | None:
        is_storage = isinstance(value, torch.storage.TypedStorage) or torch.is_storage(value)
        return "storage" if is_storage else None


def _failure(value: object) -> Exception | None:
    """Give the error that pickling raises."""
    try:
        _Probe(io.BytesIO(), protocol=2).dump(value)
    except Exception as error:  # whatever a __reduce__ or __getstate__ of the user's raises
        return error
    return None


def _culprits(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Give what cannot be pickled, and why."""
    for path, module in model.named_modules():
        name = path or "the model"
        if _failure(type(module)) is not None:
            yield name, f"its class {type(module).__qualname__} {_home(type(module))}"
        for attribute, value in vars(module).items():
            if attribute in _REGISTERS or (error := _failure(value)) is None:
                continue
            what = f"a hook of {name}" if attribute.endswith(_HOOKS) else f"{path}.{attribute}".removeprefix(".")
            yield what, _described(value, error)


def _described(value: Any, error: Exception) -> str:
    """Say what a value is."""
    while isinstance(value, dict | list | tuple) and value:
        parts = list(value.values()) if isinstance(value, dict) else list(value)
        value = next((part for part in parts if _failure(part) is not None), None)
    if callable(value) and getattr(value, "__name__", "") == "<lambda>":
        return "it is a lambda"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__qualname__} {_home(value)}"
    if "<locals>" in type(value).__qualname__:
        return f"it is a {type(value).__name__}, whose class {_home(type(value))}"
    return f"it is a {type(value).__name__} ({(str(error).splitlines() or [''])[0]})"


def _home(what: Any) -> str:
    if "<locals>" in what.__qualname__:
        return "is defined inside a function"
    return f"cannot be found under its name in {what.__module__}"
