"""A network → one graph for each call of each of its modules.

Where `analysis.trace` gives one flat graph, here every module that is called keeps a graph of its own, in which the
modules below it are single steps. What is not a tensor, and all that follows from it, is computed while tracing. Every
step is also run on the example (`values`).
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon._torch_compat import ASSERTIONS
from surgeon.errors import CaptureError
from surgeon.models.call import Inputs
from surgeon.models.copies import where
from surgeon.models.sandbox import Guard, quietly, tracing
from surgeon.python.values import Value, leaves, mapped, value_of

TODO = "`surgeon fuse -o model.pt` keeps its own code."


@dataclass(slots=True)
class Call:
    """One call of a module: the names of what it is given, its graph, and tensors that its code has made."""

    module: nn.Module
    path: str
    names: list[str]
    graph: fx.Graph
    result: Any = None
    reads: dict[int, fx.Proxy] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Given:
    """An argument of the network: its value in the example."""

    value: Any


def nested(model: nn.Module, inputs: Inputs, is_leaf: Callable[[nn.Module], bool]) -> dict[nn.Module, list[Call]]:
    """Trace a network in eval mode; gives the calls of every module that is no leaf. Leaves are in no list.

    The model is one that may be run and changed: a copy.

    Raises:
        CaptureError: the code of a module cannot be followed.
    """
    tracer: _Nested | None = None

    def answer(ask: Callable[[Any, Any], bool], value: Any, kinds: Any) -> bool:
        if type(value) is Value and _asks_what_it_is(sys._getframe(2)):
            return ask(value_of(value), kinds)
        return ask(value, kinds)

    model.eval()
    with quietly(0), torch.enable_grad(), tracing(answer) as guard:
        tracer = _Nested(model, inputs, is_leaf, guard)
        try:
            tracer.trace(_Caller(model, inputs))
        except CaptureError:
            raise
        except Exception as error:
            what = tracer.now.path if tracer.now is not None else ""
            raise CaptureError(
                f"{what or 'the model'} ({type(tracer.now.module).__name__ if tracer.now else ''}) cannot be written "
                f"as Python: tracing stopped: {where(error)}",
                todo=TODO,
            ) from error
    return tracer.calls


class _Caller(nn.Module):
    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self) -> None:
        def given(value: Any) -> Any:
            return Given(value.detach().clone()) if isinstance(value, Tensor) else value

        args, kwargs = mapped(self._inputs.args, given), mapped(dict(self._inputs.kwargs), given)
        self.model(*args, **kwargs)


class _Nested(fx.Tracer):
    def __init__(self, model: nn.Module, inputs: Inputs, is_leaf: Callable[[nn.Module], bool], guard: Guard) -> None:
        super().__init__()
        self.model, self.is_leaf, self.guard = model, is_leaf, guard
        self.thread = threading.get_ident()
        self.calls: dict[nn.Module, list[Call]] = {}
        self.now: Call | None = None
        self.is_running = False

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, placeholders = super().create_args_for_root(*args, **kwargs)
        return self.guard(function), placeholders

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Add a step, and run it."""
        if target in ASSERTIONS:
            return None
        if isinstance(target, FunctionType) and not (target.__module__ or "").startswith("torch."):
            return target(*args, **kwargs)  # it was hidden from torch.fx, by torch.fx.wrap
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind in ("call_function", "call_method"):
            made.node.meta["value"] = self._ran(lambda a, k: _perform(kind, target, a, k), args, kwargs)
        return made

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_running or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if self.now is None:
            self._enter(m, "", forward, args, kwargs)
            return None
        local = self._path_of(m)
        if self.is_leaf(m):
            step = super().create_proxy("call_module", local, args, kwargs)
            step.node.meta["value"] = self._ran(lambda a, k: forward(*a, **k), args, kwargs)
            return step
        outer, whole = self.now, f"{self.now.path}.{local}".removeprefix(".")
        inner, given = self._enter(m, whole, forward, args, kwargs)
        if (same := _passed_on(inner, given)) is not None:
            self.calls[m].remove(inner)
            return same
        assert self.now is outer
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves(inner.result)):
            return inner.result
        step = super().create_proxy("call_module", local, tuple(given), {})
        step.node.meta["value"] = mapped(inner.result, lambda one: value_of(one) if isinstance(one, Value) else one)
        return _taken_apart(inner.result, step)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.is_running or threading.get_ident() != self.thread or not isinstance(attr_val, Tensor):
            return attr_val
        return self._read(attr_val)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            assert self.now is not None
            if a.node.graph is not self.now.graph:
                raise TypeError("its forward reads what the forward of another module has left somewhere")
            return a.node
        if isinstance(a, Tensor):
            return self._read(a).node
        if type(a) is OrderedDict:  # which a graph would keep as a dict
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, tuple | list | dict | slice) and type(a) is not torch.Size:
            return self._structure(a)
        if isinstance(a, torch.Size):
            return tuple(a)
        return a

    def _structure(self, a: Any) -> Any:
        """Make a nested structure of steps of one of placeholders."""
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return type(a)(*map(self.create_arg, a))
        if isinstance(a, dict):
            return {key: self.create_arg(one) for key, one in a.items()}
        if isinstance(a, slice):
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        return (tuple if isinstance(a, tuple) else list)(map(self.create_arg, a))

    def _enter(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Call, list[Any]]:
        """Trace a call of a module; gives it, and what of its arguments is not known beforehand."""
        outer, graph = self.now, self.graph
        self.now = call = Call(m, path, [], fx.Graph(tracer_cls=type(self)))
        self.graph = call.graph
        given: list[Any] = []

        def argument(name: str, value: Any) -> Any:
            if not any(isinstance(leaf, Value | Given) for leaf in leaves(value)):
                return value
            given.append(value)
            call.names.append(name)
            placeholder = fx.Tracer.create_proxy(self, "placeholder", name, (), {})
            placeholder.node.meta["value"] = mapped(value, _known)
            return _taken_apart(value, placeholder)

        bound = inspect.signature(m.forward).bind(*args, **kwargs)
        kinds = {p.name: p.kind for p in inspect.signature(m.forward).parameters.values()}
        for name, value in bound.arguments.items():
            if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
                value = tuple(argument(f"{name}_{i}", part) for i, part in enumerate(value))
            elif kinds[name] is inspect.Parameter.VAR_KEYWORD:
                value = {key: argument(key, part) for key, part in value.items()}
            else:
                value = argument(name, value)
            bound.arguments[name] = value
        call.result = forward(*bound.args, **bound.kwargs)
        call.graph.output(self.create_arg(call.result))
        self.calls.setdefault(m, []).append(call)
        self.now, self.graph = outer, graph
        return call, given

    def _path_of(self, m: nn.Module) -> str:
        assert self.now is not None
        for path, one in self.now.module.named_modules(remove_duplicate=False):
            if one is m:
                return str(path)
        raise TypeError(f"its forward calls a {type(m).__name__} that is not registered in it")

    def _read(self, tensor: Tensor) -> fx.Proxy:
        """Give a step that reads a parameter or a buffer; other tensors are kept as constants."""
        assert self.now is not None
        if id(tensor) in self.now.reads:
            return self.now.reads[id(tensor)]
        name = next((name for name, one in _tensors(self.now.module) if one is tensor), None)
        if name is None:
            if any(one is tensor for _, one in _tensors(self.model)):
                raise TypeError("its forward reads a tensor of another module")
            name = f"constant_{len(self.now.constants)}"
            self.now.constants[name] = tensor.detach()
        step = fx.Tracer.create_proxy(self, "get_attr", name, (), {})
        step.node.meta["value"] = tensor
        self.now.reads[id(tensor)] = step
        return step

    def _ran(self, work: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = mapped((args, kwargs), _known)
        self.is_running = True
        try:
            with torch.no_grad():
                return work(args, kwargs)
        finally:
            self.is_running = False


def _perform(kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs) if kind == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)


def _known(one: Any) -> Any:
    if isinstance(one, Given):
        return one.value
    return value_of(one) if isinstance(one, fx.Proxy) else one


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _taken_apart(structure: Any, whole: Any) -> Any:
    """Give a nested structure whose placeholders are read from the step that gives the whole of it."""
    if isinstance(structure, Value | Given):
        return whole
    if isinstance(structure, dict):
        parts = {key: _part(one, whole, key) for key, one in structure.items()}
        return type(structure)(parts)
    if isinstance(structure, tuple | list):
        parts_ = [_part(one, whole, i) for i, one in enumerate(structure)]
        if hasattr(structure, "_fields"):
            return type(structure)(*parts_)
        return type(structure)(parts_)
    return structure


def _part(one: Any, whole: Any, key: Any) -> Any:
    if not any(isinstance(leaf, Value | Given) for leaf in leaves(one)):
        return one
    return _taken_apart(one, whole[key])


def _passed_on(call: Call, given: list[Any]) -> Any:
    """Give what a call was given, if it gives just that back, as what drops paths at random does in eval mode."""
    steps = [node for node in call.graph.nodes if node.op not in ("placeholder", "output")]
    if steps or not isinstance(call.result, Value) or not all(isinstance(one, Value) for one in given):
        return None
    inputs = [node for node in call.graph.nodes if node.op == "placeholder"]
    return given[inputs.index(call.result.node)] if call.result.node in inputs else None


def _asks_what_it_is(frame: FrameType | None) -> bool:
    """Whether code asks that computes with what it is given: not torch.fx, nor this file."""
    if frame is None:
        return False
    home = frame.f_globals.get("__name__", "")
    return not (home.startswith(("torch.fx", "torch.utils", "surgeon.python")))
