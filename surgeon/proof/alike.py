"""Whether it is certain that two modules compute the same, without running them.

    code(B) = code(A) and numbers(B) = numbers(A)  ⇒  B(x) = A(x), bit by bit, for every x

Certain is what can be compared to the end: the class, the code of a graph, and attributes made of plain values,
tensors, and modules in the same place. A hook, or an object that nobody can look into, makes it uncertain, and then the
modules have to be run. `structure` asks the other way round: what is different for certain?
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.models.copies import kind_of
from surgeon.nn import Stored
from surgeon.proof.calls import HISTORY
from surgeon.proof.ulps import is_same_bits

_TORCHS = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.memory_format)
_BY_IDENTITY = (type, types.BuiltinFunctionType, types.ModuleType, enum.Enum)  # no copy has another one
_Register = Mapping[str, Tensor | None]
_DEEP = 40  # levels of values in values; a value that holds itself is uncertain


def unlike(a: nn.Module, b: nn.Module, *, with_tensors: bool) -> list[str] | None:
    """Name the modules of A that are not certainly B's modules of the same name; what lies in them is not looked at.

    None if one of the two shares a module that the other does not.

    >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)) for _ in range(2))
    >>> unlike(a, b, with_tensors=False), unlike(a, b, with_tensors=True)
    ([], ['0'])
    """
    ours, theirs = (dict(one.named_modules(remove_duplicate=False)) for one in (a, b))
    pairs = {id(module): theirs[path] for path, module in ours.items() if path in theirs}
    if any(theirs[path] is not pairs[id(module)] for path, module in ours.items() if path in theirs):
        return None
    look = _Look(pairs)
    found: list[str] = []
    for path, module in ours.items():
        if any(path.startswith(f"{above}.") or not above for above in found):
            continue
        other = theirs.get(path)
        is_same = other is not None and look.is_same_code(module, other)
        if other is None or not is_same or (with_tensors and not holds_same(module, other)):
            found.append(path)
    return found


def is_filled_in(one: nn.Module, other: nn.Module) -> bool:
    """Whether one model is certainly built as the other, with tensors of the same shapes and dtypes.

    Then it is the other one with its own tensors. Buffers that are not stored have to be equal.
    """
    if unlike(one, other, with_tensors=False) != []:
        return False
    for mine, theirs in zip(one.modules(), other.modules(), strict=True):
        kept = mine._non_persistent_buffers_set
        if kept != theirs._non_persistent_buffers_set:
            return False
        if not all(is_equal(mine._buffers[name], theirs._buffers[name]) for name in kept):
            return False
        registers = _registers(mine, theirs)
        if any(_form(held[name]) != _form(expected[name]) for held, expected in registers for name in held):
            return False
    return True


def is_alike(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> bool:
    """Whether it is certain that modules, called one after the other, compute what others do."""
    if len(ours) != len(theirs):
        return False
    return all(unlike(one, other, with_tensors=True) == [] for one, other in zip(ours, theirs, strict=True))


def holds_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether the tensors of two modules are equal, those of submodules left out."""
    return all(is_equal(mine[key], theirs[key]) for mine, theirs in _registers(one, other) for key in mine)


def is_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    kinds = [Tensor if type(tensor) is nn.Parameter else type(tensor) for tensor in (one, other)]
    if kinds[0] is not kinds[1] or (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if one.layout is not other.layout or one.is_quantized or other.is_quantized or one.is_meta:
        return False
    is_same_memory = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return is_same_memory or is_same_bits(one.detach(), other.detach())


def _registers(one: nn.Module, other: nn.Module) -> list[tuple[_Register, _Register]]:
    return [(one._parameters, other._parameters), (one._buffers, other._buffers)]


def _form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.layout, tensor.is_quantized)


class _Look:
    """Compares modules of two models; `pairs` gives the module of the other one that stands in the same place."""

    def __init__(self, pairs: Mapping[int, nn.Module]) -> None:
        self.pairs = pairs

    def is_same_code(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether two modules, their tensors and submodules left aside, are certainly built the same."""
        if any(getattr(module, name, None) for module in (one, other) for name in _HOOKS):
            return False
        is_graph = isinstance(one, fx.GraphModule)
        if kind_of(one) is not kind_of(other) or isinstance(one, torch.jit.ScriptModule):
            return False
        if type(one) is not type(other):  # made for one network, as the classes of graphs are
            forwards = type(one).forward, type(other).forward
            if not (is_graph or isinstance(one, Stored)) or not self.is_same(*forwards):
                return False
        if type(one).get_extra_state is not nn.Module.get_extra_state:
            return False
        if list(one._modules) != list(other._modules) or one.training is not other.training:
            return False
        if any(list(mine) != list(theirs) for mine, theirs in _registers(one, other)):
            return False
        skipped = _TORCHS | {HISTORY} | ({"_graph"} if is_graph else set())  # its code is compared
        mine, theirs = ({k: v for k, v in vars(part).items() if k not in skipped} for part in (one, other))
        return mine.keys() == theirs.keys() and all(self.is_same(mine[key], theirs[key]) for key in mine)

    def is_same(self, one: Any, other: Any, depth: int = _DEEP) -> bool:
        """Whether two values are certainly the same."""
        if isinstance(one, nn.Module):  # a shared one too: each copy has its own
            return self.pairs.get(id(one)) is other
        if isinstance(one, _BY_IDENTITY) or depth == 0:
            return one is other
        if type(one) is not type(other):
            return False
        if isinstance(one, _PLAIN):
            return one is other or bool(one == other)
        if isinstance(one, Tensor):
            return is_equal(one, other)
        compare = next((how for kinds, how in self._ways() if type(one) in kinds), None)
        if compare is None and dataclasses.is_dataclass(one) and type(one).__module__.startswith("surgeon."):
            names = [field.name for field in dataclasses.fields(one)]
            return all(self.is_same(getattr(one, name), getattr(other, name), depth - 1) for name in names)
        return compare is not None and compare(one, other, depth - 1)

    def _ways(self) -> list[tuple[tuple[type, ...], Callable[[Any, Any, int], bool]]]:
        return [
            ((list, tuple, torch.Size), self._rows),
            ((dict, OrderedDict), self._tables),
            ((set, frozenset), lambda one, other, _: all(type(part) in _PLAIN for part in one) and one == other),
            ((types.FunctionType,), self._functions),
            ((types.MethodType,), self._methods),
            ((functools.partial,), self._partials),
        ]

    def _rows(self, one: Sequence[Any], other: Sequence[Any], depth: int) -> bool:
        return len(one) == len(other) and all(self.is_same(a, b, depth) for a, b in zip(one, other, strict=True))

    def _tables(self, one: dict[Any, Any], other: dict[Any, Any], depth: int) -> bool:
        return self._rows(list(one), list(other), depth) and self._rows([*one.values()], [*other.values()], depth)

    def _partials(self, one: functools.partial[Any], other: functools.partial[Any], depth: int) -> bool:
        mine, theirs = ([part.func, part.args, part.keywords] for part in (one, other))
        return self._rows(mine, theirs, depth)

    def _methods(self, one: types.MethodType, other: types.MethodType, depth: int) -> bool:
        return self._rows([one.__func__, one.__self__], [other.__func__, other.__self__], depth)

    def _functions(self, one: types.FunctionType, other: types.FunctionType, depth: int) -> bool:
        """Compare the code of functions, and what it reads: two graphs make two functions of the same code."""
        if one is other:
            return True
        if one.__code__ != other.__code__:
            return False
        try:
            return self.is_same(_read_by(one), _read_by(other), depth)
        except ValueError:  # a variable of the closure has no value yet
            return False


def _read_by(function: types.FunctionType) -> list[Any]:
    """List what a function reads besides its arguments."""
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return [
        *(function.__defaults__, function.__kwdefaults__, names, held),
        *(function.__globals__[name] for name in names),
    ]
