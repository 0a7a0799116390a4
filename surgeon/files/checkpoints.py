"""What lies around a model or its weights in a checkpoint, and how weights are put into a network.

Training code stores weights under a key (`state_dict`), beside an average of them, with a prefix before every name
(`module.`), or inside a wrapper (`DataParallel`). Everything that is taken off is reported in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present as strip_prefix_

from surgeon.errors import ModelError
from surgeon.files.faults import compiled, few
from surgeon.models.wrappers import inner_of

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net")
AVERAGE_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")

State = dict[str, Tensor]


def content_of(found: object, origin: str) -> tuple[nn.Module | State, list[str]]:
    """Find the model, or its weights, in what a file holds, and say what was around it.

    Raises:
        ModelError: it holds neither.
    """
    notices: list[str] = []
    if isinstance(found, Mapping) and not is_state(found):
        found, notices = _under_key(origin, found)
    content, more = bare(found, origin) if isinstance(found, nn.Module) else _without_prefix(origin, found)
    return content, notices + more


def bare(model: nn.Module, origin: str) -> tuple[nn.Module, list[str]]:
    """Take a model out of what wraps it for training."""
    notices = []
    while (attribute := inner_of(model)) is not None:
        notices.append(f"unwrapped {type(model).__name__}")
        model = model.get_submodule(attribute)
    if isinstance(model, torch.jit.ScriptModule):
        raise compiled(Path(origin), "a TorchScript program")
    return model, notices


def load_weights(model: nn.Module, state: State, origin: str) -> None:
    """Copy all of `state` into `model`; after a ModelError the model is left modified.

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


def cast_(model: nn.Module, state: State) -> None:
    """Give a newly built network the dtypes of its stored tensors; where all agree, it gets that dtype as a whole."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # a model that was stored in half precision has to be verified as one
        model.to(dtypes.pop())
        return
    for key, own in model.state_dict(keep_vars=True).items():
        if key in state and own.is_floating_point() and state[key].is_floating_point():
            own.data = own.data.to(state[key].dtype)


def is_state(found: object) -> TypeGuard[State]:
    """Whether something is a mapping of names to tensors, and holds some."""
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _under_key(origin: str, checkpoint: Mapping[Any, Any]) -> tuple[Any, list[str]]:
    """Find the model or its weights in a checkpoint; the trained weights rather than their average."""
    keys = [
        key
        for key in (*WEIGHT_KEYS, *AVERAGE_KEYS)
        if isinstance(checkpoint.get(key), nn.Module) or is_state(checkpoint.get(key))
    ]
    if not keys:
        held = few([str(key) for key in checkpoint]) or "nothing"
        raise ModelError(
            f"{origin} holds neither a model nor weights, but {held}",
            todo="Save the model's state_dict on its own, or under 'state_dict'.",
        )
    notices = [f"read the model from '{keys[0]}' in {origin}"]
    averages = [key for key in keys[1:] if key in AVERAGE_KEYS]
    notices += [f"{origin} also holds an average of the weights, under '{key}'; it is not used" for key in averages]
    return checkpoint[keys[0]], notices


def _without_prefix(origin: str, state: object) -> tuple[State, list[str]]:
    """Strip what DataParallel and torch.compile put before every key."""
    if not is_state(state):
        raise ModelError(f"{origin} holds a {type(state).__name__}", todo="Save an nn.Module, or its state_dict.")
    notices = []
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        strip_prefix_(state, prefix)
        notices.append(f"stripped the prefix '{prefix}' from {len(state)} keys of {origin}")
    return state, notices


def _loss(stored: torch.dtype, own: torch.dtype) -> str | None:
    """Say what a number would lose if it were copied into a tensor of another kind, beyond digits."""
    if stored.is_complex and not own.is_complex:
        return "complex numbers, but the network holds real ones"
    if own.is_floating_point and not stored.is_floating_point:
        return f"{str(stored).removeprefix('torch.')} numbers, but the network holds floating point ones"
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
    problem = "; ".join(f"{len(words)} {what} ({few(words)})" for what, words in lists.items() if words)
    # A classifier of another size differs in its first axis only, from one number of classes to one other.
    heads = {(len(own[key]), len(state[key]), own[key].shape[1:] == state[key].shape[1:]) for key in reshaped}
    if not missing and not unexpected and len(heads) == 1:
        _, classes, is_head = heads.pop()
        if is_head:
            return problem, f"If it has {classes} classes: --arch-arg num_classes={classes}"
    return problem, "Give the network that was trained to --arch, and the arguments it was built with to --arch-arg."
