"""What a module consists of, as data: layers of torch, containers of torch, and modules with code of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.blocks.sum_of_convs import is_ours as is_sum_of_convs
from surgeon.errors import CaptureError
from surgeon.python import layers, literals
from surgeon.python.layers import Argument
from surgeon.python.nested import TODO, Call
from surgeon.python.statements import Forward


@dataclass(slots=True)
class Layer:
    """A layer of torch.nn."""

    kind: str
    arguments: tuple[Argument, ...]

    @property
    def key(self) -> Any:
        return self.kind, tuple(one.name for one in self.arguments)

    @property
    def height(self) -> int:
        return 0


@dataclass(slots=True)
class Container:
    """nn.Sequential, nn.ModuleList or nn.ModuleDict, and what is in it."""

    kind: str
    children: dict[str, Part]

    @property
    def key(self) -> Any:
        return self.kind, tuple((name, child.key) for name, child in self.children.items())

    @property
    def height(self) -> int:
        return max((child.height for child in self.children.values()), default=0)

    @property
    def is_numbered(self) -> bool:
        return list(self.children) == [str(i) for i in range(len(self.children))]


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter or buffer of a module: its shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool


@dataclass(slots=True)
class Own:
    """A module with a forward of its own: a class is written for it."""

    name: str
    path: str
    children: dict[str, Part]
    tensors: list[Stored]
    forward: Forward | None
    key: Any = None
    height: int = 0
    values: dict[str, Any] = field(default_factory=dict)  # of the arguments of its class

    def __post_init__(self) -> None:
        tensors = tuple((one.name, len(one.shape), str(one.dtype), one.is_parameter) for one in self.tensors)
        children = tuple((name, child.key) for name, child in self.children.items())
        body = None if self.forward is None else (self.forward.parameters, self.forward.returns, self.forward.lines)
        self.key = (self.name, children, tensors, repr(body))
        self.height = 1 + max((child.height for child in self.children.values()), default=0)


Part = Layer | Container | Own


def part_of(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> Own:
    """Take a network apart that was traced.

    Raises:
        CaptureError: something of it has no text.
    """
    used = _used(model, calls)
    found = _part(model, "", calls, used)
    if isinstance(found, Own):
        return found
    raise CaptureError("the model is a single layer of torch.nn", todo="Write it as a .pt file: -o model.pt.")


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is written as a call of a class of torch.nn."""
    return layers.arguments(module) is not None


def is_container(module: nn.Module) -> bool:
    """Whether a module is written as a container of torch.nn with what is in it."""
    if layers.is_customised(module) or module._parameters or module._buffers:
        return False
    kind = type(module)
    if isinstance(module, nn.Sequential):
        return kind.forward is nn.Sequential.forward and kind.__call__ is nn.Module.__call__
    return kind in (nn.ModuleList, nn.ModuleDict)


def reach(module: nn.Module, path: str) -> str:
    """Write how a module reaches one of its parts or tensors: `self.layers[0].conv`."""
    written, at = "self", module
    for name in path.split("."):
        below = at._modules.get(name)
        is_one_still = at is not module and is_container(at)  # the module itself gets a class of its own
        numbered = isinstance(at, nn.ModuleList | nn.Sequential) and is_one_still and name.isdecimal()
        if numbered and list(at._modules) == [str(i) for i in range(len(at._modules))]:
            written += f"[{int(name)}]"
        elif isinstance(at, nn.ModuleDict) and is_one_still:
            written += f"[{literals.string(name)}]"
        elif literals.is_name(name):
            written += f".{name}"
        elif below is not None:
            written += f".get_submodule({literals.string(name)})"
        else:
            written = f"getattr({written}, {literals.string(name)})"
        if below is not None:
            at = below
    return written


def _used(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> set[nn.Module]:
    """Find the modules that are called, that hold a tensor that is read, or that hold such modules."""
    used: set[nn.Module] = {model}
    for found in calls.values():
        for one in found:
            for node in one.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    used.update(_on_the_way(one.module, str(node.target)))
    return used


def _on_the_way(module: nn.Module, path: str) -> Iterator[nn.Module]:
    for name in path.split("."):
        below = module._modules.get(name)
        if below is None:
            return
        module = below
        yield module


def _part(module: nn.Module, path: str, calls: dict[nn.Module, list[Call]], used: set[nn.Module]) -> Part:
    if path and (found := layers.arguments(module)) is not None:
        kind = layers.kind_of(module)
        assert kind is not None
        return Layer(f"nn.{kind.__name__}", found)
    is_numbered = is_container(module) and path != ""
    children: dict[str, Part] = {}
    for name, child in module._modules.items():
        where = f"{path}.{name}".removeprefix(".")
        if child is not None and child in used:
            children[name] = _part(child, where, calls, used)
        elif child is not None and is_numbered:
            children[name] = Layer("nn.Identity", ())
    if is_numbered:
        base = next(one for one in (nn.Sequential, nn.ModuleList, nn.ModuleDict) if isinstance(module, one))
        return Container(f"nn.{base.__name__}", children)
    tensors, forward = _stored(module), None
    for one in calls.get(module, ()):
        made = _forward(one, path)
        tensors += [Stored(name, tuple(t.shape), t.dtype, False) for name, t in one.constants.items()]
        if forward is not None and (made.lines, made.parameters) != (forward.lines, forward.parameters):
            raise CaptureError(
                f"{path} ({type(module).__name__}) cannot be written as Python: it does not do the same in all of its "
                f"{len(calls[module])} calls",
                todo=TODO,
            )
        forward = made
        break_on_constants(one, len(calls[module]), path)
    return Own(_class_name(module), path, children, tensors, forward)


def break_on_constants(call: Call, count: int, path: str) -> None:
    """Refuse a module that is called several times and makes tensors of its own: there would be several of each."""
    if call.constants and count > 1:
        raise CaptureError(
            f"{path} ({type(call.module).__name__}) cannot be written as Python: it makes a tensor in each of its "
            f"{count} calls",
            todo=TODO,
        )


def _forward(call: Call, path: str) -> Forward:
    try:
        return Forward(call, lambda target: reach(call.module, target))
    except literals.NoTextError as error:
        raise CaptureError(
            f"{path or 'the model'} ({type(call.module).__name__}) cannot be written as Python: {error}", todo=TODO
        ) from error


def _stored(module: nn.Module) -> list[Stored]:
    tensors: list[tuple[str, Tensor | None, bool]] = [
        *((name, one, True) for name, one in module._parameters.items()),
        *((name, one, False) for name, one in module._buffers.items()),
    ]
    return [Stored(name, tuple(one.shape), one.dtype, flag) for name, one, flag in tensors if one is not None]


def _class_name(module: nn.Module) -> str:
    """Name the class that is written for a module as its own class is called."""
    if is_sum_of_convs(module):
        return "SumOfConvs"
    own = str(vars(module).get("origin", "")).rpartition(".")[2] or type(module).__name__
    return literals.as_name(own, "Module")
