"""What one run of a network shows: which convs and norms are called, with which shapes, and what it costs."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon._torch_compat import ConvNd, NormBase
from surgeon.blocks import Block, norms
from surgeon.errors import CaptureError
from surgeon.models.call import Inputs, call_of
from surgeon.models.copies import in_mode, names, shadow, to_meta, where
from surgeon.models.cost import Counter
from surgeon.models.sandbox import quietly


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a conv in a run: the shapes that went in and came out."""

    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]


@dataclass(slots=True)
class Run:
    """What a run showed: calls by name, in order of the first; modules whose parameters others read; its cost.

    `functional` are the calls of F.conv2d that no conv makes, by the name of the parameter that is their weight.
    `taken_apart` are modules whose submodules were called although their own forward was not running: code that
    iterates over an nn.Sequential, or calls another method than forward, may do something else than forward does.
    """

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    functional: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    read_directly: set[str] = field(default_factory=set)
    taken_apart: set[str] = field(default_factory=set)
    macs: int = 0
    activations: int = 0  # bytes


def observe(model: nn.Module, inputs: Inputs | Sequence[Tensor], *, meta_only: bool = False) -> Run:
    """Run the model once in eval mode and note every call of a conv, norm or block.

    The run is made on the meta device, which computes nothing; if the model needs real values, it is made with them.

    Raises:
        CaptureError: the model does not accept the inputs.
    """
    call = call_of(inputs)
    try:
        frozen = shadow(model, to_meta).requires_grad_(False)  # torch fails on a parameter that is given to a module
        return _observe(frozen, call.on_meta())
    except Exception as error:
        if meta_only:
            raise _refusal(model, call, error) from error
    try:
        return _observe(shadow(model), call)
    except Exception as error:
        raise _refusal(model, call, error) from error


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, ConvNd)


def how_to_call(model: nn.Module, given: Inputs) -> str:
    """Say what to do when a model did not run on what was given."""
    signature = inspect.signature(model.forward)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in signature.parameters.items() if p.kind not in variadic}
    needed = [name for name, p in named.items() if p.default is p.empty]
    try:
        signature.bind(*given.args, **given.kwargs)
    except TypeError:
        words = ";".join(n if named[n].kind is inspect.Parameter.POSITIONAL_ONLY else f"{n}=1,3,8,8" for n in needed)
        takes = " and ".join(needed) or "no required input"
        optional = ", ".join(name for name in named if name not in needed)
        also = f" (and may take {optional})" if optional else ""
        example = dict.fromkeys(needed, (1, 3, 8, 8))
        such = f", for example --input '{words}' (from Python, example={example})" if needed else ""
        return f"It takes {takes}{also}{such}."
    if len(dtypes := {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}) > 1:
        return f"Its parameters are {' and '.join(sorted(dtypes))}; if that is why, save it in one dtype."
    return (
        "Give the input that it was made for: --input 1,3,224,224, or a file, or file.py:make_inputs "
        "(from Python, example=(1, 3, 224, 224))."
    )


def _observe(model: nn.Module, inputs: Inputs) -> Run:
    seen = Run()
    running = _Running(model, seen)
    paths, within = names(model), _Entered(model)

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.stack.append(module)
        seen.taken_apart |= within.passed_by(paths[module])

    def end(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            running.stack.pop()
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if given and isinstance(out, Tensor):
                seen.calls[name].append(Call(tuple(given[0].shape), tuple(out.shape)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Block | ConvNd | NormBase) or norms.is_frozen(module):
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end(name), with_kwargs=True)
    given = inputs.cast_for(model)
    with quietly(), Counter() as counter, running:
        given.call(in_mode(model, False))
    seen.macs, seen.activations = counter.macs, counter.bytes
    return seen


class _Entered:
    """The modules that hold others, and which of them have a forward that is running."""

    def __init__(self, model: nn.Module) -> None:
        self.running: list[nn.Module] = []
        self.holders: dict[str, nn.Module] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            has_parts = any(True for _ in module.children())
            if path and has_parts and not isinstance(module, nn.ModuleList | nn.ModuleDict | Block):
                self.holders[path] = module
        for module in {*self.holders.values()}:
            vars(module)["forward"] = self._noted(module, module.forward)

    def _noted(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.running.append(module)
            try:
                return forward(*args, **kwargs)
            finally:
                self.running.pop()

        return noted

    def passed_by(self, paths: Sequence[str]) -> set[str]:
        """Name the modules above a called one that are not running; none if all above one of its names are running."""
        running = {id(module) for module in self.running}
        lost = [
            {above for above in _above(path) if above in self.holders and id(self.holders[above]) not in running}
            for path in paths
        ]
        return set().union(*lost) if all(lost) else set()


def _above(path: str) -> list[str]:
    """List the paths above a path.

    >>> _above("a.b.c")
    ['a', 'a.b']
    """
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


class _Running(TorchFunctionMode):
    """Notes convs and norms whose parameters are used outside a call of their own."""

    def __init__(self, model: nn.Module, seen: Run) -> None:
        super().__init__()
        self.stack: list[nn.Module] = []
        self.seen = seen
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.owners = {
            id(parameter): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, ConvNd | NormBase)
            for parameter in module.parameters(recurse=False)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # what gives no tensor has only looked at the shape or the dtype
            for value in (*args, *(kwargs or {}).values()):
                name, owner = self.owners.get(id(value), ("", None))
                if owner is not None and not any(module is owner for module in self.stack):
                    self.seen.read_directly.add(name)
            if func is torch.conv2d and not self.stack:
                self._note_functional(result, *args, **(kwargs or {}))
        return result

    def _note_functional(self, out: Tensor, input: Tensor, weight: Tensor, *rest: Any, **others: Any) -> None:
        if name := self.names.get(id(weight)):
            self.seen.functional[name].append(Call(tuple(input.shape), tuple(out.shape)))


def _refusal(model: nn.Module, inputs: Inputs, error: Exception) -> CaptureError:
    return CaptureError(
        f"the model does not run on an input of {inputs}: {where(error)}", todo=how_to_call(model, inputs)
    )
