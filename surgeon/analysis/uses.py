"""Whether the code around a module asks of which class exactly it is.

A rewritten island keeps its attributes and submodules, and it inherits the methods and properties of its class, whose
own forward is never needed for them: a method that calls convs or norms by itself gives them plain maps, which they
take. So `isinstance` is right, too. But its class is another one, which bears another name: `type(x) is Net` is false
from then on, and so is a look at the name of the class. Code that runs in training only, or in a hook, is not seen in a
run, so it is read: its instructions name what they load.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import fx, nn

from surgeon.models.copies import names
from surgeon.nn import Stored

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ONCE = ("__init__", "__new__", "extra_repr", "__repr__")  # the model is built before anything is rewritten


def used_of_its_class(model: nn.Module, path: str) -> str | None:
    """Say what code outside a submodule asks for its exact class, which a rewritten graph does not have."""
    module = model.get_submodule(path)
    if isinstance(module, fx.GraphModule | Stored):  # it keeps its class, or has been rewritten before
        return None
    named = type(module).__name__
    for place, parts, function in _functions_around(model, module, path):
        codes = [*codes_of(function)]
        words = {word for code in codes for word in _words(code)}
        if parts is not None and not words & {part for part in parts if not part.isdigit()}:
            continue  # it does not know the module
        if any(_asks_for_the_class(code, named) for code in codes):
            return f"{place} asks whether the class of it is {named} itself, and not one that inherits it"
    return None


def own_reader(kind: type[nn.Module], name: str) -> str | None:
    """Name the method that torch calls by itself, such as `train`, in which a class of the user's reads an attribute.

    Methods that forward calls are steps of its graph, and are not meant.
    """
    called = {one for one in dir(nn.Module) if callable(getattr(nn.Module, one))} - {"forward", *_ONCE}
    own = [(one, value) for base in _between(kind) for one, value in vars(base).items() if one in called]
    return next((one for one, value in own if any(name in _words(code) for code in codes_of(value))), None)


def _between(kind: type[nn.Module]) -> list[type]:
    """The class of a module and those between it and nn.Module."""
    return [one for one in kind.__mro__ if issubclass(one, nn.Module) and one is not nn.Module]


def _functions_around(
    model: nn.Module, module: nn.Module, path: str
) -> Iterator[tuple[str, Sequence[str] | None, Any]]:
    """Give the methods outside a module, and all hooks, and by which names methods may know the module."""
    inside = {*module.modules()}
    for holder, paths in names(model).items():
        for name in _HOOKS:
            for hook in vars(holder)[name].values():
                yield f"a hook of {paths[0] or 'the model'}", None, hook
        if holder in inside:
            continue
        above = next((one for one in paths if path.startswith(f"{one}." if one else "")), None)
        parts = path.split(".") if above is None else path[len(above) :].strip(".").split(".")
        methods = {name: value for kind in reversed(_between(type(holder))) for name, value in vars(kind).items()}
        methods |= {name: value for name, value in vars(holder).items() if isinstance(value, FunctionType)}
        if type(holder).__module__.startswith("torch.nn."):
            continue
        for name, value in methods.items():
            if name not in _ONCE:
                yield f"{type(holder).__name__}.{name}", parts, value


def codes_of(value: Any) -> Iterator[CodeType]:
    """Give the code of a function, and of the functions in it."""
    if isinstance(value, functools.partial | functools.partialmethod):
        value = value.func
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, MethodType | staticmethod | classmethod):
        value = value.__func__
    waiting = [value.__code__] if isinstance(value, FunctionType) else []
    while waiting:
        yield (code := waiting.pop())
        waiting += [part for part in code.co_consts if isinstance(part, CodeType)]


def _words(code: CodeType) -> set[str]:
    """The names and texts that code holds."""
    return {*code.co_names, *code.co_freevars, *(part for part in code.co_consts if isinstance(part, str))}


def _asks_for_the_class(code: CodeType, named: str) -> bool:
    """Whether code takes the class of something and knows the name of this one; `super()` needs no class by name."""
    return bool({"type", "__class__"} & {*code.co_names}) and named in _words(code)
