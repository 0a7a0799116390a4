"""Is every module of B what the replay made: of the same class, with the same settings, hooks and constants?

Inputs show what a module does to them, and not what it would do to others: a ReLU that clips at 100, a pooling of
fixed size, an eps of 2e-5. What was replayed is at hand, so it is compared name by name as well.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from surgeon.analysis.rewritten import Rewritten
from surgeon.conv.spec import ConvSpec
from surgeon.models.copies import kind_of
from surgeon.proof.ulps import off

_DEPTH = 4  # levels of an attribute's own attributes that are compared; lists and mappings are no level
_TORCHS = frozenset(vars(nn.Module()))
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_OURS = frozenset({"surgeon_provenance"})


def differences(replay: nn.Module, b: nn.Module, changing: Collection[tuple[str, str]] = ()) -> dict[str, str]:
    """Give every module of B that is not what the replay made, with what is different about it.

    Stored tensors are compared elsewhere, and the mode (`training`) and `requires_grad` do not count: both are the
    user's to set. `changing` are the attributes that a run changes, by module and name.
    """
    ours, theirs = dict(b.named_modules(remove_duplicate=False)), dict(replay.named_modules(remove_duplicate=False))
    found = {path: f"{path or 'the model'} is missing" for path in theirs if path not in ours}
    found |= {path: f"{path} should not be there" for path in ours if path not in theirs}
    for path, module in theirs.items():
        if path in ours:
            skipped = {name for at, name in changing if at == path}
            if (said := next(_of_module(module, ours[path], skipped), None)) is not None:
                found[path] = f"{path or 'the model'} {said}"
    return found


def changed_by_running(before: nn.Module, after: nn.Module) -> set[tuple[str, str]]:
    """List the attributes in which a copy that was run differs from what it was copied from: counters and caches."""
    twins = dict(after.named_modules(remove_duplicate=False))
    return {
        (path, name)
        for path, module in before.named_modules(remove_duplicate=False)
        if path in twins
        for ours, theirs in [(_settings(module), _settings(twins[path]))]
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name], _DEPTH)
    }


def _of_module(expected: nn.Module, module: nn.Module, skipped: Collection[str]) -> Iterator[str]:
    if kind_of(module) is not kind_of(expected):
        yield f"is a {kind_of(module).__name__}, not a {kind_of(expected).__name__}"
        return
    for name in _HOOKS:
        mine, other = ([*getattr(one, name, {}).values()] for one in (module, expected))
        said = name.strip("_").replace("_", " ")
        if [*map(_name_of, mine)] != [*map(_name_of, other)]:
            yield f"has {len(mine)} {said}, not {len(other)}" if len(mine) != len(other) else f"has other {said}"
        elif not all(_does_the_same(*both, _DEPTH) for both in zip(mine, other, strict=True)):
            yield f"has {said} that do something else"
    ours, theirs = _settings(module), _settings(expected)
    if isinstance(module, Rewritten) and not all("signature" in one.get("program", {}) for one in (ours, theirs)):
        ours, theirs = _without_signature(ours), _without_signature(theirs)  # the file is of an earlier version
    for name, value in theirs.items():
        if name in skipped:
            continue
        if name not in ours:
            yield f"has no {name}"
        elif not _same(ours[name], value, _DEPTH):
            yield f"has {name} = {_brief(ours[name])}, not {_brief(value)}"
    for name in ours.keys() - theirs.keys():
        if hasattr(type(module), name) or any(name in held for held in _registers(module)):  # it hides that
            yield f"has a {name} of its own"
    yield from _constants(expected, module)


def _constants(expected: nn.Module, module: nn.Module) -> Iterator[str]:
    """Compare buffers that are not stored."""
    for name in expected._non_persistent_buffers_set & module._non_persistent_buffers_set:
        mine, other = module._buffers.get(name), expected._buffers.get(name)
        if (mine is None) is not (other is None):
            yield f"has {'no ' * (mine is None)}buffer {name}"
        elif mine is not None and other is not None and not off(mine, other, {mine.dtype}).ulps <= 1:
            yield f"has another buffer {name}"


def _settings(module: nn.Module) -> Mapping[str, Any]:
    """Give the attributes that decide what a module computes; the same padding may be written in two ways."""
    skipped = _TORCHS | _OURS | ({"_graph"} if isinstance(module, fx.GraphModule) else set())  # its code is compared
    found = {name: value for name, value in vars(module).items() if name not in skipped}
    if isinstance(module, nn.Conv2d) and "padding" in found:
        found["padding"] = ConvSpec.of(module).pads
        found.pop("_reversed_padding_repeated_twice", None)
    return found


def _without_signature(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out what a file of an earlier version does not know, and what is made of the program and holds it."""
    program = {key: value for key, value in settings["program"].items() if key != "signature"}
    return {name: value for name, value in settings.items() if name not in Rewritten.DERIVED} | {"program": program}


def _registers(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _same(one: Any, other: Any, depth: int, above: frozenset[int] = frozenset()) -> bool:
    """Whether two values are the same, as far as can be told; one of them is a copy. `above` are those they lie in."""
    if one is other or depth == 0 or id(one) in above:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape != other.shape or off(one, other, {one.dtype}).ulps <= 1  # one of another size is a cache
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Module):
        return True  # compared under its own name
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, str | bytes | int | complex | bool):
        return bool(one == other)
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return bool(one.dtype == object) or one.tobytes() == other.tobytes()
    above |= {id(one)}
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key], depth, above) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b, depth, above) for a, b in zip(one, other, strict=True))
    if isinstance(one, set | frozenset):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    if isinstance(one, functools.partial) or hasattr(one, "__func__") or hasattr(one, "__qualname__"):
        return _name_of(one) == _name_of(other) and _does_the_same(one, other, depth, above)
    if "__eq__" in {name for kind in type(one).__mro__[:-1] for name in vars(kind)}:
        try:
            return bool(one == other)
        except (RuntimeError, ValueError, TypeError):  # what holds arrays, say
            return repr(one) == repr(other)
    return _same(_held_by(one), _held_by(other), depth - 1, above)


def _does_the_same(one: Any, other: Any, depth: int, above: frozenset[int] = frozenset()) -> bool:
    """Whether two callables of one name do the same: a closure and a partial have the name of any other like it."""
    return type(one) is type(other) and _same(_parts(one), _parts(other), depth, above)


def _parts(function: Any) -> Any:
    """Give what a callable is made of, besides its name."""
    match function:
        case functools.partial():
            return [function.func, function.args, function.keywords]
        case types.MethodType():
            return [function.__func__, function.__self__]
        case types.FunctionType():
            return [_Code(function.__code__), function.__defaults__, function.__kwdefaults__, _closure(function)]
        case type():
            return None
    return _held_by(function)


@dataclass(frozen=True)
class _Code:
    """Code, which Python compares to the end."""

    code: types.CodeType


def _closure(function: types.FunctionType) -> list[Any]:
    """List what the variables of a closure hold; one may have no value yet."""
    return [[cell.cell_contents] for cell in function.__closure__ or () if cell != types.CellType()]


def _held_by(thing: Any) -> dict[str, Any]:
    """Give the attributes of an object, those in slots too."""
    slots = [kind.__dict__.get("__slots__", ()) for kind in type(thing).__mro__]
    names = [name for one in slots for name in ((one,) if isinstance(one, str) else one)]
    held = {name: getattr(thing, name) for name in names if not name.startswith("__") and hasattr(thing, name)}
    return held | getattr(thing, "__dict__", {})


def _name_of(function: Any) -> str:
    """Name a function, so that a copy of it has the same name; an object that is called is named by its class."""
    function = getattr(function, "func", function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | tuple | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"
