"""A hash of a network with its code, so that nothing is taken over from one that computes something else."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

from torch import nn

from surgeon.surgery.history import content_hash

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def network_hash(model: nn.Module) -> str:
    """Hash the tensors of a network, and the class, source and plain attributes of every module.

    >>> network_hash(nn.Sequential(nn.ReLU())) == network_hash(nn.Sequential(nn.GELU()))
    False
    """
    digest = hashlib.sha256(content_hash(model).encode())
    for name, module in model.named_modules():
        kind = type(module)
        held = {key: value for key, value in vars(module).items() if key != "training" and _is_plain(value)}
        said = f"{name} {kind.__module__}.{kind.__qualname__} {sorted(held.items())} {_source(kind)}\n"
        digest.update(said.encode(errors="backslashreplace"))
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether a value is written the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _source(kind: type) -> str:
    """The text of a class, where there is one."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
