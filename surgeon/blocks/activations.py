"""How the activations of `one_pass.streams` are written in networks: as modules, functions and methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
FUNCTIONS: Mapping[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu_: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
METHODS: Mapping[object, str] = {"relu": "relu", "relu_": "relu"}

_WORDS: Mapping[type[nn.Module], str] = {nn.Identity: "", **MODULES}
_FORWARD: Mapping[type[nn.Module], Any] = {kind: kind.forward for kind in _WORDS}  # as torch calls them


def is_left_alone(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else, such as hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def word_of(module: nn.Module) -> str | None:
    """Name the activation that calling a module applies, if that is all it does; an Identity applies ''."""
    kind = type(module)
    is_known = kind in _WORDS and kind.forward is _FORWARD[kind] and is_left_alone(module)
    return _WORDS[kind] if is_known else None
