"""Copies of a model to try things on, and what a copy of it would get wrong.

Everything is tried on a shadow, a copy that is thrown away, so that what `forward` does to `self` does not reach the
user's model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from surgeon.conv.spec import ConvSpec
from surgeon.errors import CaptureError
from surgeon.models.aliases import copied_together
from surgeon.nn import Stored

Model = TypeVar("Model", bound=nn.Module)
_OURS_AND_TORCHS = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")
_ATOMIC = frozenset(
    {type(None), bool, int, float, str, bytes, type, torch.dtype, ConvSpec}
)  # what copy.deepcopy does not copy
_OF_COPYING = (
    *("__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"),
    *("__getstate__", "__setstate__"),
)
_OF_FILES = {"__getstate__", "__setstate__", "__reduce_ex__", "__deepcopy__"}
_TORCHS_OWN = vars(nn.Module()).keys()  # _modules, _parameters, hooks


def in_mode(model: Model, training: bool) -> Model:
    """Set the mode of a model of ours, and return it; a user's own `train` may return nothing."""
    model.train(training)
    return model


def to_meta(tensor: Tensor) -> Tensor:
    """Keep shape and dtype, without numbers."""
    return tensor.to("meta")


def names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Give every name of every module; a module that is reached twice has two."""
    found: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        found[module].append(name)
    return {module: tuple(paths) for module, paths in found.items()}


def kept_aside(model: nn.Module) -> dict[nn.Module, str]:
    """Find modules that are also kept where torch does not look: in plain lists, dicts, functions and attributes."""
    found: dict[nn.Module, str] = {}

    def look(value: Any, where: str, depth: int) -> None:
        if isinstance(value, nn.Module):
            found.setdefault(value, where)
        elif depth and isinstance(value, list | tuple | set):
            for part in value:
                look(part, where, depth - 1)
        elif depth and isinstance(value, dict):
            for part in value.values():
                look(part, where, depth - 1)
        elif depth and isinstance(value, functools.partial):
            look((value.func, *value.args, *value.keywords.values()), where, depth)
        elif depth and isinstance(value, MethodType):
            look(value.__self__, where, depth)
        elif depth and isinstance(value, FunctionType):
            look(_enclosed(value), where, depth)

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _TORCHS_OWN:
                look(value, f"{name}.{attribute}".removeprefix("."), 3)
    return found


def shadow(model: Model, cast: Callable[[Tensor], Tensor] | None = None, *, shares: Sequence[object] = ()) -> Model:
    """Copy a model's structure; share its parameters and clone its buffers, or `cast` each of them once.

    Tensors that lie in the same memory do so in the copy, too; but a clone of a buffer shares none with a parameter.
    Objects that nobody changes need no copy: the copy `shares` them with the model.

    Raises:
        CaptureError: the model holds something that Python cannot copy.
    """

    def stand_in(tensor: Tensor) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        if cast is None:
            return tensor if is_parameter else together.get(id(tensor), tensor.detach().clone())
        made = together[id(tensor)] if id(tensor) in together else cast(tensor.detach())
        if made.is_inference():  # the user made it in inference mode, and it could not be trained
            made = made.clone()
        return nn.Parameter(made, tensor.requires_grad) if is_parameter else made

    _check_copyable(model)
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *held]
    own = tensors if cast is not None else [one for one in tensors if not isinstance(one, nn.Parameter)]
    together = copied_together(own, torch.clone if cast is None else cast)
    memo: dict[int, Any] = {id(t): stand_in(t) for t in tensors}
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    memo |= {id(group): group for group in groups}  # a connection to other processes has no copy
    memo |= {id(one): one for one in shares}
    try:
        made = _deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {where(error)}", todo="Move what Python cannot copy out of the module."
        ) from error
    for (name, module), twin in zip(model.named_modules(), made.modules(), strict=False):
        is_own_graph = isinstance(module, fx.GraphModule) and kind_of(module) is not fx.GraphModule  # one for each mode
        if kind_of(twin) is not kind_of(module) or is_own_graph:
            raise CaptureError(
                f"{name or 'the model'} cannot be copied: copy.deepcopy gives it another class",
                todo="Give the network that it was made from.",
            )
        twin.training = module.training
        if isinstance(module, fx.GraphModule):  # its own copying leaves the user's attributes behind, and our history
            behind = vars(module).keys() - vars(twin).keys()
            public = [attribute for attribute in behind if not attribute.startswith("_")]
            vars(twin).update({attribute: copy.deepcopy(vars(module)[attribute], memo) for attribute in public})
    return made


def _deepcopy(model: Model, memo: dict[int, Any]) -> Model:
    """Do what copy.deepcopy does, in a third of the time: most of what a module holds is empty, or needs no copy."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    below = {module for graph in graphs for module in graph.modules()}  # it looks at them while it is copied
    plain = [module for module in model.modules() if module not in below and _is_plain(type(module))]
    twins = [type(module).__new__(type(module)) for module in plain]
    memo |= {id(module): twin for module, twin in zip(plain, twins, strict=True)}

    def copied(value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMIC:
            return value
        if id(value) in memo:
            return memo[id(value)]
        if kind not in (dict, OrderedDict) or not _is_registry(value):
            return deep(value)
        made = memo[id(value)] = kind()
        made.update((key, copied(part)) for key, part in value.items())
        return made

    def deep(value: Any) -> Any:
        return copy.deepcopy(value, memo)

    for module, twin in zip(plain, twins, strict=True):
        vars(twin).update((key, copied(value)) for key, value in vars(module).items())
    made: Model = deep(model)
    return made


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a module of this class is copied by copying its attributes; what `Stored` defines of it is for files."""
    own = [name for name in _OF_COPYING if getattr(kind, name, None) is not getattr(nn.Module, name, None)]
    return not own or (issubclass(kind, Stored) and set(own) <= _OF_FILES)


def _is_registry(held: dict[Any, Any]) -> bool:
    """Whether a dict holds nothing but modules, tensors and None under names, as those that torch keeps do."""
    return all(type(key) is str and isinstance(value, nn.Module | Tensor | None) for key, value in held.items())


def duplicate(model: Model) -> Model:
    """Copy a model with its tensors.

    Raises:
        CaptureError: the model holds something that Python cannot copy.
    """
    return shadow(model, torch.clone)


def _check_copyable(model: nn.Module) -> None:
    modules = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, FunctionType):
                continue
            if any(True for _ in module.children()) if attribute == "forward" else _encloses(value, modules):
                raise CaptureError(
                    f"{name or 'the model'} has a function as its {attribute}, which would run the original in a copy",
                    todo="Make it a method of a class.",
                )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise CaptureError(
            f"{lazy[0]} has no shape yet",
            todo="Run the model once, so that its lazy layers get their shapes, and save it.",
        )


def kind_of(module: nn.Module) -> type:
    """Give the class of a module; where that was made for one network, as a GraphModule's is, its base."""
    kind = type(module)
    if issubclass(kind, Stored):
        return kind.stored_as()
    if parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module)
    is_its_own = isinstance(module, fx.GraphModule) and kind.__qualname__.endswith("GraphModuleImpl")
    return kind.__mro__[1] if is_its_own else kind


def _encloses(function: FunctionType, modules: set[nn.Module]) -> bool:
    return any(isinstance(one, nn.Module) and one in modules for one in _enclosed(function))


def _enclosed(function: FunctionType) -> list[Any]:
    """List what the variables of a closure hold."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            found.append(cell.cell_contents)
    return found


def where(error: BaseException) -> str:
    """Say in one line what was raised, and where in the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0].rstrip('.')}{place}"


def is_users(filename: str) -> bool:
    """Whether code is the user's: not surgeon's, and not torch's."""
    return not filename.startswith(_OURS_AND_TORCHS)
