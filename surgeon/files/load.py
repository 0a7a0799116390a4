"""What the user names → an `nn.Module`, without running what is in a file.

    torchvision:resnet50 · timm:repvgg_a0 · pkg.mod:factory · file.py:Net    called, with --arch-arg name=value
    tensors in .safetensors or .pt                                           weights; --arch says of which network
    a module pickled in .pt                                                  read as `pickles` describes
    TorchScript, .pt2, ONNX and the rest                                     refused, with the way out

Code runs where the user names it, never because a file does. Whatever goes wrong is a ModelError.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import ModelError
from surgeon.files import architectures, checkpoints, formats, weights
from surgeon.files.architectures import FETCHING, LIBRARIES, Architecture, is_factory
from surgeon.files.budget import Budget, is_modest
from surgeon.files.checkpoints import State
from surgeon.files.formats.base import MANIFEST
from surgeon.files.names import class_of
from surgeon.files.pickles import Trust
from surgeon.nn import Stored


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, and where it came from."""

    model: nn.Module
    architecture: Architecture | None  # how to build it again, where that was named
    origin: str  # as the user wrote it
    metadata: Mapping[str, str]  # the header of a safetensors file
    notices: tuple[str, ...]  # sentences for stderr: what was stripped, unwrapped, run


Rebuild = Callable[[str, Architecture | None, int], nn.Module]  # manifest, --arch, bytes of the weights


def load(
    name: str,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | Sequence[str] = (),
    key: str | None = None,
    trust: Trust = Trust(),  # noqa: B008 - frozen
    seed: int = 0,
    rebuild: Rebuild | None = None,
) -> Loaded:
    """Load the model in a file, or build the one that is named.

    Args:
        name: a file, or a factory such as `torchvision:resnet50`.
        arch: for a file of weights, the network that they belong to: a factory, or a file that holds such a network.
        arch_args: arguments of the factory; as text, `name=value` each, the value as JSON or Python writes it.
        key: which of several weights in a checkpoint to take, as `--weights` names them.
        trust: what a pickle may name beyond torch, torchvision, timm and surgeon.
        seed: of the initial weights of a network that is built.
        rebuild: makes the network from surgeon's own manifest in a safetensors file, and from `arch` if given.

    >>> load("torchvision:resnet18", arch_args=["num_classes=10"]).model.fc.out_features
    10

    Raises:
        ModelError: whatever is wrong, in one sentence, and what to do about it.
    """
    args = architectures.parse(arch_args)
    if not name:
        raise ModelError("the name of the model is empty", todo="Name a file, or a network: torchvision:resnet50.")
    if is_factory(name) and arch is None:
        return _called(Architecture(name, args), key, seed)
    if is_factory(name):
        raise ModelError(f"{name} is a network already", todo=f"Leave out --arch {arch}.")
    if args and arch is None:
        raise ModelError(f"--arch-arg needs --arch: {name} is a file", todo="Name the network with --arch.")
    if args and arch is not None and not is_factory(arch):
        raise ModelError(f"{arch} is a file and takes no arguments", todo="Leave out --arch-arg.")
    return _load_file(name, None if arch is None else Architecture(arch, args), key, trust, seed, rebuild)


def build(architecture: Architecture, *, trust: Trust = Trust(), seed: int = 0) -> nn.Module:  # noqa: B008 - frozen
    """Build a network with weights drawn from `seed`; nothing is downloaded unless its arguments ask for it.

    The global random state is left as it was. An architecture that names a file has that file's weights.
    """
    if is_factory(architecture.name):
        return checkpoints.bare(architectures.make(architecture, seed), architecture.name)[0]
    return load(architecture.name, trust=trust, seed=seed).model


def build_named_in_file(
    architecture: Architecture,
    stored: int = 0,
    *,
    trust: Trust = Trust(),  # noqa: B008 - frozen
    seed: int = 0,
) -> nn.Module:
    """Build a network that a file, not the user, names: its manifest could say `os:system`.

    Only torchvision and timm are called, nothing is fetched, another file is read as a safe one, and no network is
    built that is out of proportion to the bytes of weights that the file holds (`stored`).
    """
    source = architecture.name.rpartition(":")[0]
    if ":" in architecture.name and source not in LIBRARIES:
        raise ModelError(
            f"the file says that it was made from {architecture.name}, which is code that would run",
            todo=f"If you trust that code, name it yourself: --arch {architecture.name}",
        )
    args = {key: value for key, value in architecture.args.items() if key not in FETCHING}
    named = f"the network that the file says it was made from, {architecture.name},"
    todo = f"If it is right, name it yourself: --arch {architecture.name}, with --arch-arg."
    if strange := [name for name, value in args.items() if not is_modest(value)]:
        raise ModelError(f"{named} takes a {strange[0][:50]!a} that no network has", todo=todo)
    budget = Budget(stored)
    try:
        with budget:
            return build(replace(architecture, args=args), trust=replace(trust, unsafe_pickle=False), seed=seed)
    except ModelError as error:
        if not budget.is_spent:
            raise
        raise ModelError(f"{named} is much larger than the weights in it", todo=todo) from error


def read_tensors(path: Path, *, trust: Trust = Trust()) -> tuple[State, list[str]]:  # noqa: B008 - frozen
    """Read the state dict in a file, without wrappers and prefixes, and say what was taken off.

    Tensors of a safetensors file may lie unaligned in memory: copy them into a module, do not assign them.
    """
    content, notices = _read(path, trust)
    return (content.state_dict() if isinstance(content, nn.Module) else content), notices


def metadata(path: Path) -> Mapping[str, str]:
    """Read what a file says about itself besides its content, as the header of a safetensors file does."""
    return formats.of_file(path).header(path)


def _called(architecture: Architecture, key: str | None, seed: int) -> Loaded:
    """Build what the user names."""
    if key is not None:
        raise ModelError(f"{architecture.name} is no file of weights", todo=f"Leave out --weights {key}.")
    model, notices = checkpoints.bare(architectures.make(architecture, seed), architecture.name)
    return Loaded(model, architecture, architecture.name, {}, tuple(notices))


def _load_file(
    name: str, architecture: Architecture | None, key: str | None, trust: Trust, seed: int, rebuild: Rebuild | None
) -> Loaded:
    path = Path(name)
    content, notices = _read(path, _trusting(architecture, trust), key)
    header = metadata(path)
    if isinstance(content, nn.Module):
        if architecture is not None:
            notices.append(f"{name} holds a whole network, which is used as it is; --arch is ignored")
        return Loaded(content, None, name, header, tuple(notices))
    state = content
    if rebuild is not None and MANIFEST in header:
        model = rebuild(header[MANIFEST], architecture, sum(t.numel() * t.element_size() for t in state.values()))
        state = checkpoints.with_metadata(OrderedDict(state), checkpoints.metadata_of(model.state_dict()))
    elif architecture is not None:
        model = build(architecture, trust=trust, seed=seed)
    else:
        raise ModelError(
            f"{name} holds weights only", todo="Name their network: --arch torchvision:resnet50, for example."
        )
    state, more = weights.fitted(model, state, name)
    weights.cast_(model, state)
    classes = None if architecture is None else architectures.argument_for_classes(architecture)
    weights.load_weights(model, state, name, classes)
    return Loaded(model, architecture, name, header, (*notices, *more))


def _trusting(architecture: Architecture | None, trust: Trust) -> Trust:
    """Admit the modules that the user's own code defines, where --arch names that code."""
    source = architecture.name.rpartition(":")[0] if architecture and is_factory(architecture.name) else ""
    if source in ("", *LIBRARIES):
        return trust
    module = architectures.module_of(source).__name__
    if architectures.is_in_package(source):  # its parts lie in other files of the package
        module = module.partition(".")[0]
    return replace(trust, allow=(*trust.allow, module))


def _read(path: Path, trust: Trust, key: str | None = None) -> tuple[nn.Module | State, list[str]]:
    """Read a file of any kind that surgeon reads, and take off what is around the model or its weights."""
    notices = []
    kind = formats.of_file(path)
    found = kind.read(path, trust)
    if kind.runs_unchecked(trust):
        notices.append(f"unpickled {path} without checks (--unsafe-pickle): any code in it has run")
    content, more = checkpoints.content_of(found, str(path), key)
    for module in content.modules() if isinstance(content, nn.Module) else ():
        if isinstance(module, Stored):
            module.recall_(functools.partial(class_of, trust=trust))
    return content, notices + more
