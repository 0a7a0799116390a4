"""Placeholders that know what they stand for: each carries the value that a run on an example gives.

Tracing then follows code that looks at what it is given: `isinstance`, `len`, unpacking, and conditions on sizes. A
condition on numbers in a tensor is refused, since no graph holds it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

_STRUCTURAL = ("ndim", "is_cuda", "is_sparse", "is_quantized", "requires_grad", "is_meta", "is_nested", "layout")
_ASK_STRUCTURE = ("dim", "ndimension", "is_floating_point", "is_complex", "is_contiguous")
_IN_PLACE = ("add", "sub", "mul", "truediv")


class Value(fx.Proxy):
    """A placeholder of a nested trace, and its value."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        value, tracer = value_of(self), self.tracer
        found = getattr(value, name)  # an AttributeError, if it has none
        if callable(found) and not isinstance(found, Tensor):
            if name in _ASK_STRUCTURE:
                return found

            def method(*args: Any, **kwargs: Any) -> Any:
                if name in ("size", "numel", "nelement") and is_stored(self):
                    return found(*args, **kwargs)
                return tracer.create_proxy("call_method", name, (self, *args), kwargs)

            return method
        if name in _STRUCTURAL or (name in ("shape", "dtype") and is_stored(self)):
            return found
        return tracer.create_proxy("call_function", getattr, (self, name), {}, name=name)

    def __bool__(self) -> bool:
        value = value_of(self)
        if isinstance(value, Tensor):
            raise TypeError("its forward does one thing or another, as the numbers in a tensor are")
        return bool(value)

    def __len__(self) -> int:
        return len(value_of(self))

    def __iter__(self) -> Iterator[Any]:
        whole: Any = self
        return iter([whole[i] for i in range(len(value_of(self)))])

    def __abs__(self) -> Any:
        return self.tracer.create_proxy("call_function", operator.abs, (self,), {})

    def __setitem__(self, place: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, place, value), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("its forward calls what another step gives")


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    changing, plain = getattr(operator, f"i{name}"), getattr(operator, name)

    def change(self: Value, other: Any) -> Any:
        function = changing if isinstance(value_of(self), Tensor) else plain
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in _IN_PLACE:
    setattr(Value, f"__i{_name}__", _in_place(_name))


def value_of(placeholder: fx.Proxy) -> Any:
    """Give what a placeholder stands for in the run on the example."""
    return placeholder.node.meta["value"]


def is_stored(placeholder: fx.Proxy) -> bool:
    """Whether it stands for a parameter or a buffer, whose shape never changes."""
    return placeholder.node.op == "get_attr"


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every leaf of nested tuples, lists and dicts of any subclass; slices are nested, too."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, tuple) and type(value) is not torch.Size:
        return tuple(mapped(part, change) for part in value)
    if isinstance(value, list):
        return [mapped(part, change) for part in value]
    if isinstance(value, dict):
        parts = {key: mapped(part, change) for key, part in value.items()}
        return type(value)(parts) if type(value) is not dict else parts
    if isinstance(value, slice):
        return slice(*(mapped(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def leaves(value: Any) -> list[Any]:
    """List what is in nested tuples, lists, dicts and slices."""
    found: list[Any] = []
    mapped(value, found.append)
    return found
