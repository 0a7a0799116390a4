"""What the code around a module uses of the module's class, and would miss if the class were another.

A rewritten island keeps its attributes and submodules, but not the methods, properties and name of its class. A run
shows who calls them in eval mode; code that runs in training only, or in a hook, has to be read: its instructions name
what they load.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from surgeon.models.copies import names

_SEQUENCE = {"__iter__": "iterates over it", "__getitem__": "takes it apart by index", "__len__": "asks for its length"}
_ITERATORS = frozenset({"enumerate", "iter", "len", "list", "reversed", "tuple", "zip"})
_QUESTIONS = frozenset({"isinstance", "issubclass", "type"})
_NOISE = frozenset({"CACHE", "COPY_FREE_VARS", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_CONTAINERS = frozenset(dir(nn.Sequential)) | frozenset(dir(nn.ModuleDict))
_ONCE = ("__init__", "__new__", "extra_repr", "__repr__")  # the model is built before anything is rewritten


def used_of_its_class(model: nn.Module, path: str) -> str | None:
    """Say what code outside a submodule uses of its class: a method, a property, its name, or that it is a sequence."""
    module = model.get_submodule(path)
    own, kinds = _of_its_class(module), {kind.__name__ for kind in _between(type(module))}
    for place, parts, function in _functions_around(model, module, path):
        codes = [*codes_of(function)]
        words = {word for code in codes for word in _words(code)}
        if parts is not None and not words & {part for part in parts if not part.isdigit()}:
            continue  # it does not know the module
        for code in codes:
            if found := _use(code, path.rpartition(".")[2], own, kinds):
                return f"{place} {found}, which a rewritten graph would not have"
    return None


def _between(kind: type[nn.Module]) -> list[type]:
    """The class of a module and those between it and nn.Module."""
    return [one for one in kind.__mro__ if issubclass(one, nn.Module) and one is not nn.Module]


def _of_its_class(module: nn.Module) -> frozenset[str]:
    """What can be read from a module because of its class alone, beyond what every module has."""
    found = {name for kind in type(module).__mro__ for name in vars(kind)} - {*dir(nn.Module)}
    held = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    return frozenset(found - held - {"__dict__", "__weakref__", "__annotations__", "__constants__"})


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


def _use(code: CodeType, last: str, own: Collection[str], kinds: Collection[str]) -> str | None:
    """Find what code uses of the class of a module; `last` is the last part of the module's name.

    A list has an `append`, too, so what a container of torch's has counts only where it is read from that name.
    """
    known = _words(code)
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NOISE]
    for before, step in pairwise(steps):
        name, is_named = _loads(step), bool(last) and _loads(before) == last
        if name in own and (is_named or (name not in _OF_CONTAINERS and not _is_self(code, before))):
            return f"reads its '{name}'"
    texts = {part for part in code.co_consts if isinstance(part, str)}
    if "getattr" in known and (named := sorted(texts & {*own})):
        return f"reads its '{named[0]}'"
    if known & _QUESTIONS and (named := sorted({*code.co_names, *code.co_freevars} & {*kinds})):
        return f"asks whether it is a {named[0]}"
    return _use_as_sequence(steps, last, own)


def _use_as_sequence(steps: Sequence[dis.Instruction], last: str, own: Collection[str]) -> str | None:
    for i, step in enumerate(steps[:-1]):
        if not last or _loads(step) != last:
            continue
        called, after = steps[i - 2].argval if i > 1 else None, steps[i + 1].opname
        for method, what in _SEQUENCE.items():
            is_asked = {
                "__iter__": after == "GET_ITER" or (called in _ITERATORS - {"len"} and after.startswith("CALL")),
                "__len__": called == "len" and after.startswith("CALL"),
                "__getitem__": any(map(_takes_an_item, steps[i + 2 : i + 4])),
            }
            if method in own and is_asked[method]:
                return what
    return None


def _takes_an_item(step: dis.Instruction) -> bool:
    return step.opname.startswith("BINARY_S") or (step.opname == "BINARY_OP" and step.argrepr == "[]")


def _loads(step: dis.Instruction) -> str | None:
    """The attribute that an instruction loads."""
    return str(step.argval) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None


def _is_self(code: CodeType, step: dis.Instruction) -> bool:
    """Whether an instruction loads the object whose method this is."""
    loaded = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    is_first = bool(code.co_argcount) and loaded == code.co_varnames[0]
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and (is_first or loaded == "self")
