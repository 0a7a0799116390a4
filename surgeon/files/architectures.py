"""Networks that are built: what the user names with a colon is called, with the arguments that the user gives.

    torchvision:resnet50 · timm:repvgg_a0 · pkg.mod:factory · file.py:Net

Code runs here because the user names it, never because a file does. Nothing is downloaded unless an argument asks for
it.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from surgeon.errors import ModelError
from surgeon.files.faults import few, missing
from surgeon.files.pickles import on_path
from surgeon.models.sandbox import ordinary, random_states_kept

LIBRARIES = ("torchvision", "timm")
FETCHING = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
files_run: dict[str, Path] = {}  # the Python files that a user named, by the names of their modules


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a network: a factory (`torchvision:resnet50`) with its arguments, or a file that holds a network."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


def find(name: str) -> Callable[[], object]:
    """Find a function in the user's own code, `pkg.mod:function` or `file.py:function`."""
    module, _, function = name.rpartition(":")
    return _own(module, function, {})


_FOR_CLASSES = ("num_classes", "n_classes", "nclasses", "classes", "num_labels", "n_class", "num_class")


def is_factory(name: str) -> bool:
    """Whether a name stands for something to call, not for a file."""
    return ":" in name and not Path(name).exists()


def make(architecture: Architecture, seed: int) -> nn.Module:
    """Call the factory, seeded, and check what it returns."""
    source, _, name = architecture.name.rpartition(":")
    find = {"torchvision": _torchvision, "timm": _timm}.get(source, functools.partial(_own, source))
    factory = find(name, architecture.args)
    try:
        with ordinary(), random_states_kept(seed):
            model = factory()
    except (Exception, SystemExit) as error:
        raise _failed(architecture.name, error, "Give it what it needs with --arch-arg name=value.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{architecture.name} returned a {type(model).__name__}, not an nn.Module",
            todo="Name a class or function that returns the model itself.",
        )
    return model


def argument_for_classes(architecture: Architecture) -> str | None:
    """Name the argument with which a factory is told how many classes a network has, if it takes one."""
    source, _, name = architecture.name.rpartition(":")
    if not is_factory(architecture.name):
        return None
    if source in LIBRARIES:
        return _FOR_CLASSES[0]
    try:
        taken = inspect.signature(_own(source, name, {})).parameters
    except (TypeError, ValueError):  # of a class that is not written in Python
        return None
    return next((argument for argument in _FOR_CLASSES if argument in taken), None)


def parse(args: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Read `name=value` texts.

    >>> parse(["num_classes=10", "layers=[2, 2]", "eps=1e-3", "bias=true", "act=relu"])
    {'num_classes': 10, 'layers': [2, 2], 'eps': 0.001, 'bias': True, 'act': 'relu'}
    """
    if isinstance(args, Mapping):
        return dict(args)
    parsed = {}
    for arg in args:
        name, equals, text = arg.partition("=")
        parsed[name] = value = _value(text)
        if not equals or not name.isidentifier() or (value is text and text.startswith(("[", "(", "{"))):
            raise ModelError(f"--arch-arg {arg} cannot be read", todo="Write name=value: num_classes=10, layers=[2,2].")
    return parsed


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


def _torchvision(name: str, args: Mapping[str, Any]) -> Callable[[], object]:
    models = _library("torchvision.models")
    _check_known(name, models.list_models(), "torchvision")
    builder = models.get_model_builder(name)
    offline = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    if name.endswith(("googlenet", "inception_v3")) and args.get("weights") is None:
        args = {"init_weights": True, **args}  # as today, without the warning that it will change
    return functools.partial(builder, **{**offline, **args})


def _timm(name: str, args: Mapping[str, Any]) -> Callable[[], object]:
    timm = _library("timm")
    _check_known(name.partition(".")[0], timm.list_models(), "timm")
    return functools.partial(timm.create_model, name, **{"pretrained": False, **args})


def _library(name: str) -> Any:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{library} is not installed", todo=f"pip install {library}") from error


def _check_known(name: str, names: Sequence[str], library: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names)
        todo = f"Closest: {', '.join(near)}." if near else f"It has {len(names)}, for example {names[0]}."
        raise ModelError(f"{library} has no model '{name}'", todo=todo)


def _own(source: str, name: str, args: Mapping[str, Any]) -> Callable[[], object]:
    """Find a factory in the user's own code, `pkg.mod:factory` or `file.py:Net`."""
    module = module_of(source)
    try:
        factory = functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(module)) or [n for n in dir(module) if not n.startswith("_")]
        raise ModelError(f"{source} has no '{name}'", todo=f"It has {few(near)}.") from error
    if not callable(factory):
        raise ModelError(f"{source}:{name} is a {type(factory).__name__}", todo="Name a class or a function.")
    return functools.partial(factory, **args)


def module_of(source: str) -> ModuleType:
    """Import the module, or run the file, that holds a user's own factory."""
    try:
        return _run_file(Path(source)) if source.endswith(".py") else _import(source)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {source}", error, "Try it with `python -c` first.") from error


def _import(name: str) -> ModuleType:
    with on_path(Path.cwd(), first=True):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and lacks something itself
            raise ModelError(
                f"there is no module '{error.name}' here", todo="Name it as `python -m` would, or as file.py:Net."
            ) from error


def _run_file(path: Path) -> ModuleType:
    """Import a Python file under its own name, so that what it defines can be pickled and found again."""
    if not path.is_file():
        raise missing(path)
    if (path.parent / "__init__.py").is_file():
        return _run_in_package(path)
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
            return known
        raise ModelError(f"'{path.stem}' is the name of another module in use", todo=f"Rename {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    files_run[path.stem] = path
    try:
        with on_path(path.parent, first=True):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _run_in_package(path: Path) -> ModuleType:
    """Import a Python file that lies in a package under its name there, so that its relative imports work."""
    parts, folder = [path.stem] * (path.stem != "__init__"), path.resolve().parent
    while (folder / "__init__.py").is_file():
        parts, folder = [folder.name, *parts], folder.parent
    files_run[parts[0]] = path
    with on_path(folder, first=True):
        module = importlib.import_module(".".join(parts))
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise ModelError(
            f"'{parts[0]}' is the name of another package in use", todo=f"Rename the folder that {path} lies in."
        )
    return module


def is_in_package(source: str) -> bool:
    """Whether a Python file lies in a package."""
    return source.endswith(".py") and (Path(source).parent / "__init__.py").is_file()


def _failed(what: str, error: BaseException, todo: str) -> ModelError:
    last = (str(error).strip().splitlines() or [""])[-1].rstrip(".")
    return ModelError(f"{what} failed with {type(error).__name__}: {last}", todo=todo)
