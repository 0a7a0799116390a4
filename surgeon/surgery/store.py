"""Save and reload, atomically, with provenance.

A `.pt` is the module itself, pickled; a `.safetensors` is its weights and a manifest (in the header, key `surgeon`)
that names the architecture and replays what was done to it. Both carry their history: for every operation the hash of
the tensors before and after, the recipe's text, the plan, the versions. It is plain data.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from surgeon._version import __version__
from surgeon.analysis import sites
from surgeon.errors import StoreError
from surgeon.files.load import MANIFEST, Architecture, Loaded, Trust, build, build_named_in_file, files_run
from surgeon.files.pickles import PACKAGES, lies_in
from surgeon.models import devices
from surgeon.models.call import Inputs, recall
from surgeon.models.copies import shadow
from surgeon.proof.distance import as_double
from surgeon.surgery import plan as plans
from surgeon.surgery.fold import fold_blocks_
from surgeon.surgery.operate import operate_
from surgeon.surgery.plan import Plan

_ATTRIBUTE = "surgeon_provenance"  # on the model itself, so that it survives training and the person's own torch.save
_FORMAT = 1  # of histories and manifests; another one is refused
SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: `plan` is what convert carried out; `parent` and `result` hash all tensors before and after."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    operation: str  # convert or fuse
    parent: str
    result: str
    plan: dict[str, Any] | None
    versions: dict[str, str]
    dense: bool = False  # fuse: blocks that cost less than their conv were folded too


def versions() -> dict[str, str]:
    return {"surgeon": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def history(model: nn.Module) -> tuple[Step, ...]:
    """What surgeon has done to a model, oldest first."""
    return _steps(vars(model).get(_ATTRIBUTE, {"history": ()}))


def record_(model: nn.Module, step: Step) -> None:
    """Add an operation to a model's history."""
    steps = [asdict(known) for known in (*history(model), step)]
    setattr(model, _ATTRIBUTE, {"format": _FORMAT, "history": steps})


def redo_(model: nn.Module, steps: Sequence[Step], before: Sequence[Step] = ()) -> nn.Module:
    """Carry out recorded operations again on `model` itself, and return it; `before` are those not in its history."""
    done = [*history(model), *before]
    for step in steps:
        if step.plan is None:
            fold_blocks_(model, planned_inputs(done), dense=step.dense)
        else:
            plan = Plan.model_validate(step.plan)
            plans.check(plan, sites.survey(model, called_with=plan.inputs))  # it may have come with a file
            operate_(model, plan)
        done.append(step)
    return model


def planned_inputs(steps: Sequence[Step]) -> Inputs | None:
    """Give the inputs of the last plan that was carried out, still to be drawn."""
    records = (step.plan.get("input") for step in reversed(steps) if step.plan is not None)
    return recall(next(records, None))


def redo_rounding_(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """The same in float64, but between two operations every tensor is rounded to its dtype, as it is in a file."""
    for i, step in enumerate(steps[:-1]):
        exact = redo_(shadow(model, as_double), [step], steps[:i])
        redo_(model, [step], steps[:i]).load_state_dict(exact.state_dict())
    return redo_(shadow(model, as_double), steps[-1:], steps[:-1])


def rebuild(manifest: str, given: Architecture | None, *, trust: Trust, seed: int) -> nn.Module:
    """Make the network that a safetensors file of ours belongs to: build its architecture, do to it what was done.

    Raises:
        StoreError: the manifest is not ours, names no architecture (give one with --arch), or another one than given.
    """
    named, steps = _named(manifest), _steps(_data(manifest))
    if given is None and named is None:
        raise StoreError(
            "the file holds weights, and does not say of which network",
            todo="Name what it was made from: --arch model.pt.",
        )
    if given is not None:
        model = build(given, trust=trust, seed=seed)
    elif named is not None:  # the file chose the name, so it may only be one of a library's
        model = build_named_in_file(named, trust=trust, seed=seed)
    known = len(history(model))
    for i, step in enumerate(steps[known:]):
        if step.plan is not None and step.plan["model"] != sites.fingerprint(model):
            raise StoreError("the file was not made from that network", todo="Name what it was made from with --arch.")
        redo_(model, [step], steps[known : known + i])
    setattr(model, _ATTRIBUTE, {"format": _FORMAT, "history": [asdict(step) for step in steps]})
    return model


def architecture_of(loaded: Loaded) -> Architecture | None:
    """Say how a loaded network is built, if that was named now or when its file was written."""
    if loaded.architecture is not None or MANIFEST not in loaded.metadata:
        return loaded.architecture
    return _named(loaded.metadata[MANIFEST])


def content_hash(model: nn.Module) -> str:
    """Hash names, dtypes, shapes and bytes of all stored tensors."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # a module's own extra state
            digest.update(f"{key} {value!r}\n".encode())
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        if not value.is_meta:
            _feed(digest, value)
    return digest.hexdigest()


def claim(path: Path, *, force: bool, suffixes: Sequence[str] = SUFFIXES, origin: str | None = None) -> Path:
    """Make sure, before any work is done, that a file may be written; `origin` is what it is made from.

    Raises:
        StoreError: it exists and `force` was not given, or it is its own origin; its folder does not exist, or its
            suffix is not one of ours.
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


def save(model: nn.Module, path: Path, *, architecture: Architecture | None = None, force: bool = False) -> None:
    """Write a model, from the CPU wherever it lies; the suffix says how.

    Raises:
        StoreError: the file exists (and `force` is not given), or cannot be written; nothing is left behind.
    """
    claim(path, force=force)
    model = devices.on(model, devices.CPU)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda part: _save_tensors(model, architecture, part))
    else:
        write_atomically(path, lambda part: torch.save(model, part))


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


def to_open_again(model: nn.Module, path: Path, architecture: Architecture | None) -> str | None:
    """Say what a person has to give to open a file that was just written, if anything."""
    if path.suffix == ".safetensors":
        return f"to open {path} again, name its network with --arch" if architecture is None else None
    foreign = {
        m.__module__.partition(".")[0]: type(m)
        for m in reversed(list(model.modules()))
        if not lies_in(m.__module__, PACKAGES)
    }
    flags = [_admission(module, kind) for module, kind in sorted(foreign.items())]
    return f"to open {path} again, give {' '.join(flags)}" if flags else None


def _admission(module: str, kind: type[nn.Module]) -> str:
    """Name the option that lets a pickle hold the modules of a person's own code."""
    file = files_run.get(module)
    if file is None or file.parent.resolve() == Path.cwd():
        return f"--allow {module}"
    return f"--arch {file}:{kind.__qualname__}"


def _data(manifest: str) -> Any:
    try:
        return json.loads(manifest)
    except ValueError as error:
        raise _foreign() from error


def _named(manifest: str) -> Architecture | None:
    """Say how a network is built, as far as a manifest tells."""
    named = _data(manifest)
    try:
        return _ARCHITECTURE.validate_python(named["architecture"])
    except (ValidationError, TypeError, KeyError) as error:
        raise _foreign() from error


def _steps(data: Any) -> tuple[Step, ...]:
    """Read a history, which may have come with a file: nothing in it is believed before it has been looked at."""
    try:
        if data.get("format", _FORMAT) != _FORMAT:
            raise _foreign()
        steps = _HISTORY.validate_python(data["history"])
        for step in steps:
            if step.plan is not None:
                Plan.model_validate(step.plan)
    except (ValidationError, TypeError, KeyError, AttributeError) as error:
        raise _foreign() from error
    return steps


_HISTORY = TypeAdapter(tuple[Step, ...])
_ARCHITECTURE = TypeAdapter(Architecture | None)


def _foreign() -> StoreError:
    return StoreError(
        f"the history in the file is not one of surgeon {__version__}",
        todo="Save the weights alone, and name their network with --arch.",
    )


def _save_tensors(model: nn.Module, architecture: Architecture | None, path: Path) -> None:
    tensors = _untied(model.state_dict())
    manifest = {
        "format": _FORMAT,
        "architecture": None if architecture is None else asdict(architecture),
        **vars(model).get(_ATTRIBUTE, {}),
    }
    save_file(tensors, path, metadata={"format": "pt", MANIFEST: json.dumps(manifest)})


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors that share nothing; what is a second name of one is found again in the network itself."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StoreError(f"{key} is no tensor, and safetensors holds nothing else", todo="Write a .pt file.")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first.setdefault(place, key) != key:
            continue
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[key] = tensor.detach().contiguous() if whole else tensor.detach().clone().contiguous()
    return tensors


def _feed(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Hash the bytes of a tensor where they lie."""
    tensor = tensor.detach().cpu().contiguous()
    if size := tensor.numel() * tensor.element_size():
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
