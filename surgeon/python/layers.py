"""Layers of torch.nn → the calls that make them again, with the arguments that differ from their defaults.

What a class is built with is read from its signature and from the attributes of the same names. Whether that is all is
tried: the layer is made again, and must have the same attributes and tensors of the same shapes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgeon.python.literals import NoTextError, text

_SKIPPED = ("device", "dtype", "_weight", "_freeze", "init", "min_value", "max_value", "process_group")
_ALIKE_IN_PLACE = ("training", "num_batches_tracked")
REQUIRED = inspect.Parameter.empty
_TENSORS_ASKED_FOR = {"bias": "bias", "add_bias_kv": "bias_k"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a layer; `default` is `inspect.Parameter.empty` where there is none."""

    name: str
    value: Any
    default: Any = REQUIRED

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_default(self) -> bool:
        return not self.is_required and same(self.value, self.default)


def same(one: Any, other: Any) -> bool:
    """Whether two values are written alike: 1 is not True, and NaN is NaN."""
    return repr(one) == repr(other)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that a module computes as; None where it has more than that of its own."""
    own: list[type] = []
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules.") and getattr(nn, kind.__name__, None) is kind:
            names = {name for one in own for name in vars(one) if not name.startswith("__") or name == "__call__"}
            inherited = {name for name in names - {"reset_parameters", "extra_repr"} if hasattr(kind, name)}
            return None if any(callable(getattr(kind, name)) for name in inherited) else kind
        own.append(kind)
    return None


def is_customised(module: nn.Module) -> bool:
    """Whether something was added to a module that its class does not show: hooks, or a forward of its own."""
    return any(vars(module).get(name) for name in _HOOKS) or "forward" in vars(module)


def arguments(module: nn.Module) -> tuple[Argument, ...] | None:
    """Give what a layer of torch.nn is built with, or None where it is no such layer, or is not all of that.

    >>> [(one.name, one.value) for one in arguments(nn.Conv2d(3, 8, 3, padding=1)) if not one.is_default]
    [('in_channels', 3), ('out_channels', 8), ('kernel_size', 3), ('padding', 1)]
    """
    kind = kind_of(module)
    if kind is None or is_customised(module) or issubclass(kind, nn.RNNBase | nn.Sequential):
        return None
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in _SKIPPED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in _TENSORS_ASKED_FOR:
            held = getattr(module, _TENSORS_ASKED_FOR[name], None)
            value = (held is not None) if not isinstance(module, nn.MultiheadAttention) else _has_bias(module, name)
            value = parameter.default if isinstance(held, bool) else value
        elif not hasattr(module, name):
            return None
        else:
            value = getattr(module, name)
        found.append(Argument(name, value, parameter.default))
    short = _short(found)
    for made in ([replace(one, value=one.default) if one.name == "bias" else one for one in short], short, found):
        if _makes(kind, made, module):
            return tuple(made)
    return None


def _has_bias(module: nn.MultiheadAttention, name: str) -> bool:
    return (module.in_proj_bias if name == "bias" else module.bias_k) is not None


def _short(found: list[Argument]) -> list[Argument]:
    """Write (3, 3) as 3, and leave out the stride of a pooling that is its kernel."""
    made: list[Argument] = []
    for one in found:
        value = one.value
        if isinstance(value, tuple) and value and all(same(part, value[0]) for part in value):
            value = value[0]
        if one.name == "stride" and one.default is None and same(value, made[0].value):
            value = None
        made.append(Argument(one.name, value, one.default))
    return made


def _makes(kind: type[nn.Module], found: list[Argument], module: nn.Module) -> bool:
    """Whether a layer that is built so is the module, but for the numbers in its tensors."""
    given = {one.name: one.value for one in found if not one.is_default}
    try:
        for value in given.values():
            text(value)
        with torch.device("meta"):
            made = kind(**given)
    except (NoTextError, TypeError, ValueError, RuntimeError):
        return False
    ours, theirs = ({key: tuple(t.shape) for key, t in one.state_dict().items()} for one in (made, module))
    if ours != theirs or {*made._parameters} != {*module._parameters} or {*made._modules} != {*module._modules}:
        return False
    names = [name for name in vars(made) if name not in _ALIKE_IN_PLACE and not _is_of_modules(name)]
    return all(name in vars(module) and same(vars(made)[name], vars(module)[name]) for name in names)


def _is_of_modules(name: str) -> bool:
    return name in _OF_MODULES


_OF_MODULES = frozenset(vars(nn.Module()))
