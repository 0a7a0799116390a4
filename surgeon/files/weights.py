"""How weights are put into a network: which of the prefixes that training code adds has to go, and what does not fit.

A framework stores the network as a part of something larger: `model.conv.weight` beside `criterion.weight`. Which keys
the network has is known, so the prefix that gives them all is the one; if several do, the user has to choose.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import ModelError
from surgeon.files.checkpoints import State, below, metadata_of, with_metadata
from surgeon.files.faults import few

_DEEPEST = 8  # parts of a prefix
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")


def fitted(model: nn.Module, state: State, origin: str) -> tuple[State, list[str]]:
    """Give the weights under the names that the network has, and say what was taken off and what is left over.

    Weights that do not fit under any prefix are given as they are.

    Raises:
        ModelError: several networks in the file fit.
    """
    own = model.state_dict()
    found = {prefix: part for prefix in _prefixes(state) if _has_all(own, part := below(state, prefix))}
    if len(found) > 1:
        found = {prefix: part for prefix, part in found.items() if _same_shapes(own, part)} or found
    trained = [prefix for prefix in found if not _AVERAGE.search(prefix)]
    if len(trained) > 1 or len(found) > len(trained) != 1:
        names = " and ".join(f"'{prefix.rstrip('.')}'" for prefix in found)
        raise ModelError(
            f"{origin} holds the weights of several such networks, under {names}",
            todo=f"Choose one: --weights {next(filter(None, found)).rstrip('.')}",
        )
    if not found:
        return state, []
    prefix = trained[0] if trained else next(iter(found))
    notices = [f"stripped the prefix '{prefix}' from {len(found[prefix])} keys of {origin}"] if prefix else []
    notices += [
        f"{origin} also holds an average of the weights, under '{other}'; --weights {other.rstrip('.')} chooses it"
        for other in found
        if other != prefix
    ]
    return _without_rest(model, own, state, prefix, tuple(other for other in found if other != prefix), origin, notices)


def _without_rest(
    model: nn.Module,
    own: State,
    state: State,
    prefix: str,
    averages: tuple[str, ...],
    origin: str,
    notices: list[str],
) -> tuple[State, list[str]]:
    """Leave out what belongs to something else than the network, and say so; what is in a part of its stays."""
    parts = {name for name, _ in model.named_children()} | {key.partition(".")[0] for key in own}
    part = below(state, prefix)
    taken = OrderedDict((key, t) for key, t in part.items() if key in own or key.partition(".")[0] in parts)
    kept = with_metadata(taken, metadata_of(part))
    rest = [key for key in state if key.removeprefix(prefix) not in kept or not key.startswith(prefix)]
    if rest := [key for key in rest if not (averages and key.startswith(averages))]:
        notices = [*notices, f"left over in {origin}, and not used: {few(rest)}"]
    return kept, notices


def _prefixes(state: State) -> list[str]:
    """List every beginning of a key that ends with a dot, and the empty one first."""
    found = {"": None}
    for key in state:
        parts = key.split(".")[:-1][:_DEEPEST]
        found |= dict.fromkeys(".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return list(found)


def _has_all(own: State, part: State) -> bool:
    """Whether all tensors of a network are there; one that it holds under several names needs to be there under one."""
    if len(part) < len({_place(tensor) for tensor in own.values()}):
        return False
    given = {_place(own[key]) for key in part if key in own}
    return bool(own) and all(key in part or _place(tensor) in given for key, tensor in own.items())


def _same_shapes(own: State, part: State) -> bool:
    return all(part[key].shape == tensor.shape for key, tensor in own.items() if key in part)


def load_weights(model: nn.Module, state: State, origin: str, classes: str | None = None) -> None:
    """Copy all of `state` into `model`; after a ModelError the model is left modified.

    `classes` is the argument with which the network is told how many classes it has, if it takes one.
    Tensors that the model holds under several names need to be there under one: safetensors files store them once.
    """
    own = model.state_dict()
    for key, tensor in state.items():
        if key in own and (obstacle := _obstacle(tensor)):
            raise ModelError(f"{key} in {origin} {obstacle[0]}", todo=obstacle[1])
        if key in own and (loss := _loss(tensor.dtype, own[key].dtype)):
            raise ModelError(
                f"{key} in {origin} holds {loss}", todo="Save the weights in the dtype that the network has."
            )
    given = {_place(own[key]): tensor for key, tensor in state.items() if key in own}
    tied = {key: given[_place(tensor)] for key, tensor in own.items() if key not in state and _place(tensor) in given}
    state = with_metadata(OrderedDict({**state, **tied}), metadata_of(state))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem, todo = _misfit(own, state, classes)
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


def _obstacle(tensor: Tensor) -> tuple[str, str] | None:
    """Say why the numbers of a tensor cannot be copied into a network, and what to do."""
    if tensor.is_meta:
        return "has no numbers: it lies on the meta device", "Save the weights from where they have been loaded."
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return f"is stored as {layout}, and a network takes dense weights", "Save it as tensor.to_dense()."
    return None


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


def _misfit(own: State, state: State, classes: str | None) -> tuple[str, str]:
    """Say how weights differ from those of the network, and what may help."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in reshaped]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problem = "; ".join(f"{len(words)} {what} ({few(words)})" for what, words in lists.items() if words)
    if classes and not missing and not unexpected and (count := _classes(own, state, reshaped)):
        return problem, f"If it has {count} classes: --arch-arg {classes}={count}"
    return problem, "Give the network that was trained to --arch, and the arguments it was built with to --arch-arg."


def _classes(own: State, state: State, reshaped: list[str]) -> int | None:
    """Count the classes of weights that differ from the network in the size of the classifier only.

    Such weights have all of the last layer in another size, and differ in their first axis, from one number of classes
    to one other.
    """
    last = next(reversed(own)).rpartition(".")[0] if own else ""
    sizes = {own[key].shape[:1] + state[key].shape[:1] for key in reshaped}
    is_whole = all(key in reshaped for key in own if key.rpartition(".")[0] == last)
    is_first_axis = all(own[key].dim() and own[key].shape[1:] == state[key].shape[1:] for key in reshaped)
    return state[reshaped[0]].shape[0] if reshaped and is_whole and is_first_axis and len(sizes) == 1 else None
