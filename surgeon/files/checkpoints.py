"""What lies around a model or its weights in a checkpoint.

Training code stores weights under a key (`state_dict`), beside an average of them, with a prefix before every name
(`module.`), or inside a wrapper (`DataParallel`). Everything that is taken off is reported in a sentence. `--weights`
names a key, or a prefix, where the usual one is not wanted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present as strip_prefix_

from surgeon.errors import ModelError
from surgeon.files import whole
from surgeon.files.faults import compiled, few
from surgeon.models.wrappers import inner_of

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net")
AVERAGE_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")
_QUANTISED = ("._packed_params", ".qweight", ".qzeros", ".SCB", ".quant_state")  # ends of keys, of several libraries
_DEEPEST = 3  # mappings within each other, each under a usual key
_LOWEST = 5  # of them under any keys

State = dict[str, Tensor]


def content_of(found: object, origin: str, wanted: str | None = None) -> tuple[nn.Module | State, list[str]]:
    """Find the model, or its weights, in what a file holds, and say what was around it.

    Raises:
        ModelError: it holds neither, or not what is `wanted`.
    """
    notices: list[str] = []
    if wanted is not None:
        found, notices = _wanted(origin, found, wanted)
    while isinstance(found := _as_tensors(found), Mapping) and not is_state(found):
        _refuse_quantised(origin, found)
        found, more = _under_key(origin, found)
        notices = notices + more
    if isinstance(found, Mapping):
        _refuse_quantised(origin, found)
    if isinstance(found, nn.Module):
        whole.check(found, origin)
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


def is_state(found: object) -> TypeGuard[State]:
    """Whether something is a mapping of names to tensors, and holds some."""
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """Take the weights whose names begin with a prefix, without it, and what the state dict says of their modules."""
    made = OrderedDict((key[len(prefix) :], tensor) for key, tensor in state.items() if key.startswith(prefix))
    said = {f"{path}.": value for path, value in metadata_of(state).items()}
    kept = {key[len(prefix) : -1]: value for key, value in said.items() if key.startswith(prefix)}
    return with_metadata(made, kept)


def metadata_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give what a state dict says of its modules, as torch's own ones do: versions, and the roles of blocks."""
    said = getattr(state, "_metadata", None)
    return {
        path: value
        for path, value in (said.items() if isinstance(said, Mapping) else ())
        if isinstance(path, str) and isinstance(value, dict) and isinstance(value.get("version"), int | None)
    }


def with_metadata(state: OrderedDict[str, Tensor], said: Mapping[str, Any]) -> State:
    """Let a state dict say this of its modules."""
    vars(state)["_metadata"] = dict(said)
    return state


def _as_tensors(found: object) -> object:
    """Turn the NumPy arrays in a mapping of weights into tensors."""
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) or _is_array(v) for v in found.values()):
        return found
    if all(isinstance(value, Tensor) for value in found.values()):
        return found  # with what it says of its modules
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in found.items()}


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def _wanted(origin: str, found: object, wanted: str) -> tuple[Any, list[str]]:
    """Find what `--weights` names: a key of the checkpoint, keys of keys with dots between them, or a prefix."""
    if isinstance(found, nn.Module):
        return found, [f"{origin} holds a whole network; --weights is ignored"]
    at, path = found, wanted.rstrip(".")
    while isinstance(at, Mapping) and path and not any(isinstance(key, str) and _is_below(key, path) for key in at):
        key = next((k for k in at if isinstance(k, str) and _is_below(path, k)), None)
        if key is None:
            break
        at, path = at[key], path.removeprefix(key).removeprefix(".")
    if isinstance(at, Mapping) and path in at and not isinstance(at[path], Tensor):
        return at[path], [f"took what {origin} holds under '{wanted}'"]
    if not path:
        return at, [f"took what {origin} holds under '{wanted}'"]
    inner = (
        at
        if is_state(at)
        else next((at[k] for k in WEIGHT_KEYS if is_state(at.get(k))), {})
        if isinstance(at, Mapping)
        else {}
    )
    if found_there := below(inner, f"{path}."):
        count = f"{len(found_there)} of {len(inner)} tensors in {origin}"
        return found_there, [f"took the {count} whose names begin with '{path}.'"]
    there = dict.fromkeys(str(key).partition(".")[0] for key in (*inner, *(at if isinstance(at, Mapping) else ())))
    raise ModelError(f"{origin} holds nothing under '{wanted}'", todo=f"It holds {few(there) or 'no weights at all'}.")


def _is_below(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _under_key(origin: str, checkpoint: Mapping[Any, Any]) -> tuple[Any, list[str]]:
    """Find the model or its weights in a checkpoint; the trained weights rather than their average."""
    keys = [key for key in (*WEIGHT_KEYS, *AVERAGE_KEYS) if _holds_model(checkpoint.get(key))]
    if not keys:
        held = few([str(key) for key in checkpoint]) or "nothing"
        others = list(_paths(checkpoint))
        todo = f"--weights {others[0]} would take what lies there." if others else ""
        raise ModelError(
            f"{origin} holds neither a model nor weights, but {held}"
            if not others
            else f"{origin} holds weights under {few(others)}, and under none of the usual keys",
            todo=todo or "Save the model's state_dict on its own, or under 'state_dict'.",
        )
    notices = [f"took what {origin} holds under '{keys[0]}'"]
    for key in keys[1:]:
        what = "an average of the weights" if key in AVERAGE_KEYS else "weights"
        notices.append(f"{origin} also holds {what}, under '{key}', not used unless chosen with --weights {key}")
    return checkpoint[keys[0]], notices


def _holds_model(value: object, depth: int = 0) -> bool:
    """Whether something is a model, or weights, or a mapping that holds one of the two under a usual key."""
    if isinstance(value, nn.Module) or is_state(value):
        return True
    if not isinstance(value, Mapping) or not value or depth == _DEEPEST:
        return False
    if all(isinstance(one, Tensor) or _is_array(one) for one in value.values()):
        return True
    return any(_holds_model(value.get(key), depth + 1) for key in (*WEIGHT_KEYS, *AVERAGE_KEYS))


def _paths(checkpoint: Mapping[Any, Any]) -> Iterator[str]:
    """Name the places, a few levels down, where models or weights lie, as `--weights` takes them."""
    seen, level = {id(checkpoint)}, [("", checkpoint)]
    for _ in range(_LOWEST):
        level, above = [], level
        for prefix, mapping in above:
            for key, value in mapping.items():
                if not isinstance(key, str) or id(value) in seen:
                    continue
                if _holds_model(value):
                    yield f"{prefix}{key}"
                elif isinstance(value, Mapping):
                    seen.add(id(value))  # a checkpoint may hold itself
                    level.append((f"{prefix}{key}.", value))


def _refuse_quantised(origin: str, found: Mapping[Any, Any]) -> None:
    """Say that weights are those of a quantised network."""
    named = [key for key, value in found.items() if getattr(value, "is_quantized", False) is True]
    named += [key for key in found if isinstance(key, str) and key.endswith(_QUANTISED)]
    if named:
        raise ModelError(
            f"{origin} holds quantised weights ({few(map(str, named[:1]))}), which no network of floating point takes",
            todo="Give the weights from before they were quantised.",
        )


def _without_prefix(origin: str, state: object) -> tuple[State, list[str]]:
    """Strip what DataParallel and torch.compile put before every key."""
    if not is_state(state):
        raise ModelError(f"{origin} holds a {type(state).__name__}", todo="Save an nn.Module, or its state_dict.")
    notices = []
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        strip_prefix_(state, prefix)
        notices.append(f"stripped the prefix '{prefix}' from {len(state)} keys of {origin}")
    return state, notices
