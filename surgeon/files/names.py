"""Which names a pickle may use, and what they stand for.

Every name in a file must lie in an admitted package. Only then is anything imported, and then each must be, whatever it
calls itself, an `nn.Module` class of an admitted package, an enumeration, or, in a package that the user has named with
`--allow`, a plain function or a class of plain data. A block that an installed distribution offers (entry point
`surgeon.blocks`) is admitted by itself, not its package. docs/security.md has the whole table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.fx
from torch import nn

from surgeon import blocks
from surgeon.blocks import sum_of_convs
from surgeon.errors import ModelError
from surgeon.files import functions
from surgeon.files.plain import is_enum, obstacle
from surgeon.nn import HOMES, current_name

PACKAGES = ("torch.nn", "torchvision", "timm", "surgeon")

# Modules whose very state is a program. No flag but --unsafe-pickle admits them.
PROGRAMS = (torch.fx.GraphModule, torch.jit.ScriptModule)

# What whole models (119 of torchvision's and 1340 of timm's were measured) and checkpoints hold besides modules and
# tensors. A file may refer to these and make blank ones; what it may call is listed in `calls`. `builtins.getattr`,
# which reaches everything, stands for a look-up in a list of torch's functions.
HARMLESS = frozenset(
    {
        "argparse.Namespace",  # the options of a training run
        "builtins.bytes",  # none
        "builtins.frozenset",
        "functools.partial",  # of what else is admitted; it is made, not called
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "surgeon.nn.ConvSpec",
        "surgeon.nn.Pads",
        "timm.layers.activations.gelu",
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
        "torchvision.ops.poolers.LevelMapper",  # a detector that has run once holds one
        "types.SimpleNamespace",
    }
    | functions.NAMES
    | set(functions.STANDARD)
)
# Names that are found without an import: standard library only, and the same objects under any version's name for them.
_STANDARD: dict[str, object] = {
    "builtins.bytes": bytes,
    "builtins.frozenset": frozenset,
    "functools.partial": functools.partial,
    "types.SimpleNamespace": types.SimpleNamespace,
    **functions.STANDARD,
    **{f"pathlib.{kind.__name__}": kind for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)},
    **{f"pathlib.{kind.__name__}": kind for kind in (pathlib.PosixPath, pathlib.WindowsPath)},
}


# What torch.save writes of the one kind of GraphModule that is read, and what stands for it here. `calls` asks of every
# one whether it is of that kind; nothing of torch.fx is called.
class NoTracer:
    """Stands where torch notes with what a graph was traced."""


GRAPHS: dict[str, object] = {sum_of_convs.REDUCE: sum_of_convs.rebuild, sum_of_convs.TRACER: NoTracer}

# Classes of torchvision and timm that honest models hold as values, besides those of torch.nn (one model of each
# family was looked at). Any other could be a network that fetches what it is told to, put where a forward calls it.
STORED = frozenset({"timm.models.nextvit.NextConvBlock", "timm.models.nextvit.NextTransformerBlock"})

# How NumPy names what its arrays and scalars are made with. `arrays` says which arrays are read.
NUMPY = frozenset(
    {"numpy.dtype", "numpy.ndarray"}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
)
# Wrappers for training that a file cannot be opened with, and where they keep the model.
_WRAPPERS = {
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "lightning.fabric.wrappers._FabricModule": "module",
    "lightning_fabric.wrappers._FabricModule": "module",
}
_SCRIPT = "defined in a script"
_PROGRAM = "a program that runs when it is opened"
_OUTSIDE = "outside the admitted packages"
_NO_CLASS_OF_OURS = "not a class that this version of surgeon knows"


@dataclass(frozen=True, slots=True)
class Trust:
    """What a file may do: name the modules of more packages (`--allow`), or run as it likes (`--unsafe-pickle`)."""

    allow: tuple[str, ...] = ()
    unsafe_pickle: bool = False


def lies_in(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is below one of the packages; whole names, so `timmy.net` is not in `timm`."""
    return any(name.startswith(f"{package}.") for package in packages)


def offered_blocks() -> dict[str, type[nn.Module]]:
    """Give the blocks that other distributions offer, by the names that files have for them."""
    named = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in blocks.registry().values()}
    return {name: kind for name, kind in named.items() if not lies_in(name, PACKAGES)}


@contextmanager
def on_path(folder: Path, *, first: bool) -> Iterator[None]:
    """Let modules in `folder` be imported: before all others, as `python -m` does, or only where no other answers."""
    entry = str(folder.resolve())
    sys.path.insert(0 if first else len(sys.path), entry)
    try:
        yield
    finally:  # the folder may have been there before, at another place, where it stays
        places = [i for i, one in enumerate(sys.path) if one == entry]
        if places:
            del sys.path[places[0 if first else -1]]


def admitted(path: Path, names: Sequence[str], trust: Trust) -> dict[str, object]:
    """Find what the names stand for. Nothing is imported unless every name may be.

    Raises:
        ModelError: names that are not admitted, each with the reason.
    """
    if wrapper := next((name for name in names if name in _WRAPPERS), None):
        kind, inner = wrapper.rpartition(".")[2], _WRAPPERS[wrapper]
        raise ModelError(
            f"{path} holds a model that is wrapped in {kind}",
            todo=f"Save what is inside: torch.save(model.{inner}, …).",
        )
    refused = {name: why for name in names if (why := _refusal(name, trust))}
    if sum_of_convs.TRACER in names and sum_of_convs.REDUCE not in names:
        refused[sum_of_convs.TRACER] = _PROGRAM
    found: dict[str, object] = {}
    for name in () if refused else names:
        try:
            found[name] = _find(name, trust)
        except _RefusedError as error:
            refused[name] = str(error)
    if refused:
        raise _refused(path, refused)
    return found


def unknown_graph(path: Path) -> ModelError:
    """Make the error for a GraphModule that is none of surgeon's."""
    return _refused(path, {sum_of_convs.REDUCE: _PROGRAM})


def _refused(path: Path, refused: Mapping[str, str]) -> ModelError:
    reasons = sorted(set(refused.values()))
    listed = [", ".join(n for n in refused if refused[n] == why) + f" ({why})" for why in reasons]
    problem = f"{path} holds names that may not be loaded: {'; '.join(listed)}"
    return ModelError(problem, todo=_way_out(refused), refused=tuple(refused))


def class_of(name: str, trust: Trust) -> object:
    """Find a class that a file names in a text, if it might have named it as a class; None if not."""
    try:
        return None if _refusal(name, trust) else _find(name, trust)
    except _RefusedError:
        return None


def _refusal(name: str, trust: Trust) -> str | None:
    """Say why a name may not even be looked up."""
    if (name := current_name(name)) in HARMLESS or name in NUMPY or name in GRAPHS:
        return None
    if name.startswith("__main__."):
        return _SCRIPT
    if name.startswith(("torch.fx.", "torch.jit.")):
        return _PROGRAM
    if not all(part.isidentifier() and not part.startswith("__") for part in name.split(".")):
        return f"{_OUTSIDE}, since no file has a use for it" if lies_in(name, PACKAGES) else _OUTSIDE
    if lies_in(name, ("surgeon",)):
        return None if name.removeprefix("surgeon.nn.") in HOMES else _NO_CLASS_OF_OURS
    return None if lies_in(name, (*PACKAGES, *trust.allow)) or name in offered_blocks() else _OUTSIDE


class _RefusedError(Exception):
    """Why a name that was looked up is not admitted."""


def _find(name: str, trust: Trust) -> object:
    """Import what the name stands for, and judge that, not the name."""
    name = current_name(name)
    if name in GRAPHS:
        return GRAPHS[name]
    found = _STANDARD[name] if name in _STANDARD else _imported(name)
    if name in HARMLESS or name in NUMPY:
        return found
    packages = (*PACKAGES, *trust.allow)
    if not lies_in(name, packages) and offered_blocks().get(name) is found:
        return found
    if not isinstance(found, type | types.FunctionType):
        raise _RefusedError("not an nn.Module class")
    if isinstance(found, type) and issubclass(found, PROGRAMS):
        raise _RefusedError(_PROGRAM)
    home = f"{found.__module__}.{found.__qualname__}"
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_module and not is_enum(found) and not lies_in(home, trust.allow):
        raise _RefusedError("not an nn.Module class")
    if not lies_in(home, packages):
        raise _RefusedError(f"really {home}, {_OUTSIDE}")
    if why := obstacle(found):
        raise _RefusedError(why)
    return found


def _imported(name: str) -> object:
    where, _, attribute = name.rpartition(".")
    if name in NUMPY and where.endswith(".multiarray"):  # NumPy 2 reads what NumPy 1 has written, and vice versa
        where = "numpy._core.multiarray" if importlib.util.find_spec("numpy._core") else "numpy.core.multiarray"
    try:
        # No name of torch, torchvision, timm, surgeon or NumPy may come from the current folder.
        is_own = not lies_in(name, (*PACKAGES, "numpy", "torch"))
        with on_path(Path.cwd(), first=False) if is_own else nullcontext():
            found: object = getattr(importlib.import_module(where), attribute)
            return found
    except ModuleNotFoundError as error:
        raise _RefusedError(f"there is no module {error.name} here") from error
    except (Exception, SystemExit) as error:  # importing runs the package; what it raises is its own affair
        raise _RefusedError(f"not in the version installed here: {error}") from error


def _way_out(refused: Mapping[str, str]) -> str:
    """Say what the user can do about refused names."""
    reasons = set(refused.values())
    if scripted := [name.rpartition(".")[2] for name, why in refused.items() if why == _SCRIPT]:
        return f"Save its state_dict, and say where the class is: --arch file.py:{scripted[0]}"
    if _PROGRAM in reasons:
        return "Save the module that it was made from, or its state_dict and use --arch."
    if missing := [why.split()[4] for why in reasons if why.startswith("there is no module")]:
        return f"Install {missing[0].partition('.')[0]}, or stand where it can be imported; or use --arch with weights."
    if reasons == {_NO_CLASS_OF_OURS}:
        return "Upgrade: pip install -U conv-surgeon."
    packages = {".".join(name.split(".")[: 2 if name.startswith("torch.") else 1]) for name in refused}
    hopeless = {"numpy", *sys.builtin_module_names, *sys.stdlib_module_names}
    if reasons == {_OUTSIDE} and not packages & hopeless:
        return f"If you trust that code, admit its modules: {' '.join(f'--allow {name}' for name in sorted(packages))}"
    return "Save its state_dict where you trust it, and use --arch; --unsafe-pickle would run any code in the file."
