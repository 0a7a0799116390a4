"""What the person names → an `nn.Module`, without running what is in a file.

    torchvision:resnet50 · timm:repvgg_a0 · pkg.mod:factory · file.py:Net    called, with --arch-arg name=value
    tensors in .safetensors or .pt                                           weights; --arch says of which network
    a module pickled in .pt                                                  read as `pickles` describes
    TorchScript, .pt2, ONNX and the rest                                     refused, with the way out

Code runs where the person names it, never because a file does. Whatever goes wrong is a ModelError.
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
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present as strip_prefix_

from surgeon.errors import ModelError
from surgeon.files import pickles
from surgeon.files.pickles import Trust
from surgeon.models.sandbox import ordinary, random_states_kept

__all__ = [
    "Architecture",
    "Loaded",
    "Trust",
    "build",
    "build_named_in_file",
    "find",
    "load",
    "load_weights",
    "metadata",
    "read_tensors",
]

LIBRARIES = ("torchvision", "timm")
MANIFEST = "surgeon"  # where a safetensors header keeps surgeon's own manifest
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net")
AVERAGE_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
FETCHING = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch < 1.6 wrote first

State = dict[str, Tensor]
files_run: dict[str, Path] = {}  # the Python files that a person named, by the names of their modules


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a network: a factory (`torchvision:resnet50`) with its arguments, or a file that holds the like."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, and where it came from."""

    model: nn.Module
    architecture: Architecture | None  # how to build it again, where that was named
    origin: str  # as the person wrote it
    metadata: Mapping[str, str]  # the header of a safetensors file
    notices: tuple[str, ...]  # sentences for stderr: what was stripped, unwrapped, run


Rebuild = Callable[[str, Architecture | None], nn.Module]


def load(
    name: str,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | Sequence[str] = (),
    trust: Trust = Trust(),  # noqa: B008 - frozen
    seed: int = 0,
    rebuild: Rebuild | None = None,
) -> Loaded:
    """Load the model in a file, or build the one that is named.

    Args:
        name: a file, or a factory such as `torchvision:resnet50`.
        arch: for a file of weights, whose they are: a factory, or a file that holds such a network.
        arch_args: arguments of the factory; as text, `name=value` each, the value as JSON or Python writes it.
        trust: what a pickle may name beyond torch, torchvision, timm and surgeon.
        seed: of the initial weights of a network that is built.
        rebuild: makes the network from surgeon's own manifest in a safetensors file, and from `arch` if given.

    >>> load("torchvision:resnet18", arch_args=["num_classes=10"]).model.fc.out_features
    10

    Raises:
        ModelError: whatever is wrong, in one sentence, and what to do about it.
    """
    args = _parse(arch_args)
    if not name:
        raise ModelError("the name of the model is empty", todo="Name a file, or a network: torchvision:resnet50.")
    if _is_factory(name) and arch is None:
        architecture = Architecture(name, args)
        model, notices = _bare(_make(architecture, seed), name)
        return Loaded(model, architecture, name, {}, tuple(notices))
    if _is_factory(name):
        raise ModelError(f"{name} is a network already", todo=f"Leave out --arch {arch}.")
    if args and arch is None:
        raise ModelError(f"--arch-arg has nothing to go to: {name} is a file", todo="Name the network with --arch.")
    if args and arch is not None and not _is_factory(arch):
        raise ModelError(f"{arch} is a file and takes no arguments", todo="Leave out --arch-arg.")
    return _load_file(name, None if arch is None else Architecture(arch, args), trust, seed, rebuild)


def build(architecture: Architecture, *, trust: Trust = Trust(), seed: int = 0) -> nn.Module:  # noqa: B008 - frozen
    """Build a network with weights drawn from `seed`; nothing is downloaded unless its arguments ask for it.

    The global random state is left as it was. An architecture that names a file has that file's weights.
    """
    if _is_factory(architecture.name):
        return _bare(_make(architecture, seed), architecture.name)[0]
    return load(architecture.name, trust=trust, seed=seed).model


def build_named_in_file(architecture: Architecture, *, trust: Trust = Trust(), seed: int = 0) -> nn.Module:  # noqa: B008
    """Build a network that a file, not the person, names: its manifest could say `os:system`.

    Only torchvision and timm are called, nothing is fetched, and another file is read as a safe one.
    """
    source = architecture.name.rpartition(":")[0]
    if ":" in architecture.name and source not in LIBRARIES:
        raise ModelError(
            f"the file says that it was made from {architecture.name}, which is code that would run",
            todo=f"If you trust that code, name it yourself: --arch {architecture.name}",
        )
    args = {key: value for key, value in architecture.args.items() if key not in FETCHING}
    return build(replace(architecture, args=args), trust=replace(trust, unsafe_pickle=False), seed=seed)


def find(name: str) -> Callable[[], object]:
    """Find a function in the person's own code, `pkg.mod:function` or `file.py:function`."""
    module, _, function = name.rpartition(":")
    return _own(module, function, {})


def read_tensors(path: Path, *, trust: Trust = Trust()) -> tuple[State, list[str]]:  # noqa: B008 - frozen
    """Read the state dict in a file, without wrappers and prefixes, and say what was taken off.

    Tensors of a safetensors file may lie unaligned in memory: copy them into a module, do not assign them.
    """
    content, notices = _read(path, trust)
    return (content.state_dict() if isinstance(content, nn.Module) else content), notices


def metadata(path: Path) -> dict[str, str]:
    """Read the header of a safetensors file; other files have none."""
    if _kind(path) != "safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def load_weights(model: nn.Module, state: State, origin: str) -> None:
    """Copy all of `state` into `model`; on a ModelError the model is spoilt.

    Tensors that the model holds under several names need to be there under one: safetensors files store them once.
    """
    own = model.state_dict()
    for key, tensor in state.items():
        if key in own and (loss := _loss(tensor.dtype, own[key].dtype)):
            raise ModelError(
                f"{key} in {origin} holds {loss}", todo="Save the weights in the dtype that the network has."
            )
    given = {_place(own[key]): tensor for key, tensor in state.items() if key in own}
    tied = {key: given[_place(tensor)] for key, tensor in own.items() if key not in state and _place(tensor) in given}
    if tied:
        state = {**state, **tied}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem, todo = _misfit(own, state)
        what = problem or str(error).splitlines()[-1].strip()
        raise ModelError(f"the weights in {origin} do not fit the network: {what}", todo=todo) from error


def _loss(stored: torch.dtype, own: torch.dtype) -> str | None:
    """Say what a number would lose if it were copied into a tensor of another kind, beyond digits."""
    if stored.is_complex and not own.is_complex:
        return "complex numbers, and the network real ones"
    if own.is_floating_point and not stored.is_floating_point:
        return f"{str(stored).removeprefix('torch.')} numbers, and the network floating point ones"
    return None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Say where a tensor lies; an empty or a meta tensor lies nowhere, so it is its own place."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _misfit(own: State, state: State) -> tuple[str, str]:
    """Say how weights differ from those of the network, and what may help."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in reshaped]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problem = "; ".join(f"{len(words)} {what} ({_few(words)})" for what, words in lists.items() if words)
    # A classifier of another size differs in its first axis only, from one number of classes to one other.
    heads = {(len(own[key]), len(state[key]), own[key].shape[1:] == state[key].shape[1:]) for key in reshaped}
    if not missing and not unexpected and len(heads) == 1:
        _, classes, is_head = heads.pop()
        if is_head:
            return problem, f"If it tells {classes} classes apart: --arch-arg num_classes={classes}"
    return problem, "Name with --arch the network that was trained, and with --arch-arg how it was built."


def _load_file(
    name: str, architecture: Architecture | None, trust: Trust, seed: int, rebuild: Rebuild | None
) -> Loaded:
    path = Path(name)
    content, notices = _read(path, _trusting(architecture, trust))
    header = metadata(path)
    if isinstance(content, nn.Module):
        if architecture is not None:
            notices.append(f"{name} holds a whole network, which is used as it is, without --arch")
        return Loaded(content, None, name, header, tuple(notices))
    state = content
    if rebuild is not None and MANIFEST in header:
        model = rebuild(header[MANIFEST], architecture)
    elif architecture is not None:
        model = build(architecture, trust=trust, seed=seed)
    else:
        raise ModelError(f"{name} holds weights only", todo="Say whose they are: --arch torchvision:resnet50, say.")
    _cast_(model, state)
    load_weights(model, state, name)
    return Loaded(model, architecture, name, header, tuple(notices))


def _trusting(architecture: Architecture | None, trust: Trust) -> Trust:
    """Whoever names code of their own with --arch admits the modules that it defines."""
    source = architecture.name.rpartition(":")[0] if architecture and _is_factory(architecture.name) else ""
    if source in ("", *LIBRARIES):
        return trust
    module = _module_of(source).__name__
    return replace(trust, allow=(*trust.allow, module))


def _cast_(model: nn.Module, state: State) -> None:
    """Give a network that was built the dtypes of its stored tensors; what is not stored follows where all agree."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # a model in half precision is one, and is not to be verified as if it were not
        model.to(dtypes.pop())
        return
    for key, own in model.state_dict(keep_vars=True).items():
        if key in state and own.is_floating_point() and state[key].is_floating_point():
            own.data = own.data.to(state[key].dtype)


def _read(path: Path, trust: Trust) -> tuple[nn.Module | State, list[str]]:
    """Read a file of any kind that surgeon reads, and take off what is around the model or its weights."""
    kind = _kind(path)
    notices = []
    if kind == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                found: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise _damaged(path, error) from error
    else:
        found = (pickles.read if kind == "zip" else pickles.read_legacy)(path, trust)
        if trust.unsafe_pickle:
            notices.append(f"unpickled {path} unchecked, as --unsafe-pickle says: what it holds has run")
    if isinstance(found, Mapping) and not _is_state(found):
        found, more = _under_key(path, found)
        notices += more
    content, more = _bare(found, str(path)) if isinstance(found, nn.Module) else _without_prefix(path, found)
    return content, notices + more


def _kind(path: Path) -> str:
    """Tell a file by its first bytes: safetensors, zip or legacy; refuse whatever holds no module and no tensors."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", todo="Name a file that you may read.") from error
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head.startswith(LEGACY_MAGIC):
        return "legacy"
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself", todo="Run `git lfs pull`.")
    if head and (path.suffix == ".safetensors" or _has_safetensors_header(path, head)):
        return "safetensors"
    if path.suffix == ".onnx":
        raise _compiled(path, "an ONNX graph")
    what = "is not a model file that surgeon knows" if head else "is empty"
    raise ModelError(f"{path} {what}", todo="surgeon reads .safetensors files and what torch.save writes.")


def _has_safetensors_header(path: Path, head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    if "constants.pkl" in names:
        raise _compiled(path, "a TorchScript program")
    if names & {"archive_format", "serialized_exported_program.json"}:
        raise _compiled(path, "a torch.export program")
    if "data.pkl" not in names:
        raise ModelError(f"{path} is a zip that torch.save did not write", todo="Name the model file itself.")
    return "zip"


def _missing(path: Path) -> ModelError:
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := difflib.get_close_matches(path.name, names):
        return ModelError(f"there is no file {path}", todo=f"Did you mean {path.parent / near[0]}?")
    return ModelError(f"there is no file {path}", todo="A network of a library is named so: torchvision:resnet50")


def _damaged(path: Path, error: Exception) -> ModelError:
    why = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
    return ModelError(f"{path} is damaged or cut short: {why}", todo="Copy or download it again.")


def _compiled(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is {what}: it holds no modules", todo="Name the nn.Module that it was made from.")


def _is_state(found: object) -> TypeGuard[State]:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _under_key(path: Path, checkpoint: Mapping[Any, Any]) -> tuple[Any, list[str]]:
    """Find the model or its weights in a checkpoint; the trained weights rather than their average."""
    keys = [
        key
        for key in (*WEIGHT_KEYS, *AVERAGE_KEYS)
        if isinstance(checkpoint.get(key), nn.Module) or _is_state(checkpoint.get(key))
    ]
    if not keys:
        held = _few([str(key) for key in checkpoint]) or "nothing"
        raise ModelError(
            f"{path} holds neither a model nor weights, but {held}",
            todo="Save the model's state_dict on its own, or under 'state_dict'.",
        )
    notices = [f"took what {path} holds under '{keys[0]}'"]
    averages = [key for key in keys[1:] if key in AVERAGE_KEYS]
    notices += [f"{path} also holds an average of the weights, under '{key}'; it was left" for key in averages]
    return checkpoint[keys[0]], notices


def _without_prefix(path: Path, state: object) -> tuple[State, list[str]]:
    """Strip what DataParallel and torch.compile put before every key."""
    if not _is_state(state):
        raise ModelError(f"{path} holds a {type(state).__name__}", todo="Save an nn.Module, or its state_dict.")
    notices = []
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        strip_prefix_(state, prefix)
        notices.append(f"stripped the prefix '{prefix}' from {len(state)} keys of {path}")
    return state, notices


def _bare(model: nn.Module, origin: str) -> tuple[nn.Module, list[str]]:
    """Take a model out of what wraps it for training."""
    notices = []
    while (attribute := WRAPPERS.get(type(model).__name__)) and attribute in dict(model.named_children()):
        notices.append(f"unwrapped {type(model).__name__}")
        model = model.get_submodule(attribute)
    if isinstance(model, torch.jit.ScriptModule):
        raise _compiled(Path(origin), "a TorchScript program")
    return model, notices


def _is_factory(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _make(architecture: Architecture, seed: int) -> nn.Module:
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
        todo = f"Closest: {', '.join(near)}." if near else f"It has {len(names)}, {names[0]} for one."
        raise ModelError(f"{library} has no model '{name}'", todo=todo)


def _own(source: str, name: str, args: Mapping[str, Any]) -> Callable[[], object]:
    """Find a factory in the person's own code, `pkg.mod:factory` or `file.py:Net`."""
    module = _module_of(source)
    try:
        factory = functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(module)) or [n for n in dir(module) if not n.startswith("_")]
        raise ModelError(f"{source} has no '{name}'", todo=f"It has {_few(near)}.") from error
    if not callable(factory):
        raise ModelError(f"{source}:{name} is a {type(factory).__name__}", todo="Name a class or a function.")
    return functools.partial(factory, **args)


def _module_of(source: str) -> ModuleType:
    try:
        return _run_file(Path(source)) if source.endswith(".py") else _import(source)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {source}", error, "Try it with `python -c` first.") from error


def _import(name: str) -> ModuleType:
    with pickles.on_path(Path.cwd(), first=True):
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
        raise _missing(path)
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
        with pickles.on_path(path.parent, first=True):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _failed(what: str, error: BaseException, todo: str) -> ModelError:
    last = (str(error).strip().splitlines() or [""])[-1].rstrip(".")
    return ModelError(f"{what} failed with {type(error).__name__}: {last}", todo=todo)


def _parse(args: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Read `name=value` texts.

    >>> _parse(["num_classes=10", "layers=[2, 2]", "eps=1e-3", "bias=true", "act=relu"])
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


def _few(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:3]) + (f", … {len(words) - 3} more" if len(words) > 3 else "")
