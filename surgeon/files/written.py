"""What can be written so that it can be read: asked before the work, and again of the file that was written."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from surgeon.blocks.sum_of_convs import is_ours
from surgeon.errors import ModelError, StoreError
from surgeon.files import calls, formats, whole
from surgeon.files.names import HARMLESS, NUMPY, PACKAGES, Trust, admitted, lies_in, offered_blocks, unknown_graph
from surgeon.files.steps import UNKNOWN_GRAPH, Program
from surgeon.nn import Stored, current_name

_HOOKS = "hooks"
_REGISTERS = ("_parameters", "_buffers", "_modules")


def check_writable(model: nn.Module, trust: Trust = Trust()) -> None:  # noqa: B008 - frozen
    """Make sure that a model can be pickled, and read again; its numbers are not looked at.

    Raises:
        StoreError: the attribute that cannot be, and what to do.
    """
    check_graphs(model)
    if (error := _failure(model)) is None:
        _check_attributes(model, trust)
        return
    where, what = next(_culprits(model), ("the model", str(error)))
    computed = {type(module) for module in model.modules() if parametrize.is_parametrized(module)}
    way_out = "Use a function or class with a name of its own in a module, or remove it"
    if computed and all(issubclass(kind, nn.Conv2d) for kind in computed):
        way_out = "Convert it with --bake, which makes the tensors of convs permanent"
    raise StoreError(
        f"{where} cannot be written to a file: {what}",
        todo=f"{way_out}; or write only the weights, -o NAME.safetensors.",
    )


def check_graphs(model: nn.Module) -> None:
    """Make sure that a model holds no GraphModule of which a file would be a program.

    Raises:
        StoreError: it holds one; what can be written instead.
    """
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and _objection(module, Trust()) is not None:
            raise StoreError(
                f"{path or 'the model'} is a GraphModule, whose file would be a program that runs when it is opened",
                todo="Write its weights, NAME.safetensors, and open them with --arch file.py:make (or arch=…), where "
                "make() builds the GraphModule anew; or give the network that it was traced from.",
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

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if isinstance(value, torch.storage.TypedStorage):
            kind = getattr(torch, value._pickle_storage_type())  # type: ignore[no-untyped-call]
            return "storage", kind, "0", "cpu", value._size()  # type: ignore[no-untyped-call]
        if isinstance(value, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, "0", "cpu", value.nbytes()
        return None


def _check_attributes(model: nn.Module, trust: Trust) -> None:
    """Refuse attributes that a file of the model would hold and that no file may."""
    if _objection(model, trust) is None:
        return
    for path, module in model.named_modules():
        unwritten = (*_REGISTERS, "_graph") if is_ours(module) else _REGISTERS
        for attribute, value in vars(module).items():
            if attribute in unwritten or (why := _objection(value, trust)) is None:
                continue
            where = _place(path, attribute)
            raise StoreError(
                f"{where} could be written to a file, but not read again: it is {_kind(value)}; {why}",
                todo="Take it off the model, for example by making it in a function that forward calls; "
                "or write only the weights, -o NAME.safetensors.",
            )


def _objection(value: object, trust: Trust) -> str | None:
    """Say why a file with this value would be refused, if every package that it names were admitted."""
    file = io.BytesIO()
    _Probe(file, protocol=2).dump(value)
    program = Program(file.getvalue())
    try:
        names = _names(file.getvalue())
    except Exception:  # whatever torch's reader makes of it
        return "its pickle has steps that torch's safe reader does not take"
    if any(name.startswith("__main__.") for name in names):
        return None  # what is to be done about those is said when the file is written
    own = [name.partition(".")[0] for name in names if _needs_admission(current_name(name))]
    trust = Trust((*trust.allow, *own))
    try:
        why = program.objection(admitted(Path("its pickle"), names, trust), trust, lambda _, size: size)
    except ModelError as error:
        return error.problem
    if why == UNKNOWN_GRAPH:
        return unknown_graph(Path("its pickle")).problem
    return why and f"its pickle {why}"


def _names(program: bytes) -> list[str]:
    """List what a pickle names beyond torch's own tensors and containers; torch tells this of whole files."""
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as records:
        records.writestr("probe/data.pkl", program)
        records.writestr("probe/version", "3")
    archive.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(archive))


def _kind(value: object) -> str:
    """Say what a value is: a function by its name, everything else by its class."""
    name = getattr(value, "__qualname__", None)
    return str(name) if callable(value) and name else f"a {type(value).__name__}"


def _place(path: str, attribute: str) -> str:
    """Name an attribute as a user writes it, and a hook by its module."""
    return f"a hook of {path or 'the model'}" if attribute.endswith(_HOOKS) else f"{path}.{attribute}".removeprefix(".")


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
        if not isinstance(module, Stored) and _failure(type(module)) is not None:
            yield name, f"its class {type(module).__qualname__} {_home(type(module))}"
        for attribute, value in vars(module).items():
            if attribute in _REGISTERS or (error := _failure(value)) is None:
                continue
            yield _place(path, attribute), _described(value, error)


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
