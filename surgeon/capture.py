"""nn.Module → islands: the largest submodules whose graph is known, and the same in train and eval mode.

Symbolic tracing records one run of `forward` with placeholders instead of tensors. It cannot follow everything
(control flow on values), and what it records is one run: `self.training` and the defaults of optional arguments are
baked in. So a module is traced in both modes, and, unless it is the whole model, with its optional arguments both left
out and open. All graphs equal: an island. Otherwise its own Python stays as it is, and its children are tried.

Graphs are read here, not run: the training flag of a functional dropout is no difference.

Everything is done on a shadow, a copy that is thrown away, so that whatever `forward` does to `self` does not reach the
person's model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import random
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from surgeon.blocks import Block
from surgeon.errors import CaptureError

Model = TypeVar("Model", bound=nn.Module)
_OURS_AND_TORCHS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_TORCHS_OWN = vars(nn.Module()).keys()  # _modules, _parameters, hooks
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True, slots=True)
class Island:
    """A submodule at `path` ('' is the model itself) and its graph; targets are relative to it."""

    path: str
    graph: fx.Graph


@dataclass(frozen=True, slots=True)
class Opaque:
    """A submodule whose own Python could not be followed, and why."""

    path: str
    reason: str


@dataclass(slots=True)
class Capture:
    islands: list[Island] = field(default_factory=list)
    opaque: list[Opaque] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a conv in a run: the shapes that went in and came out."""

    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]


@dataclass(slots=True)
class Observed:
    """What a run showed: the calls by name, in order of the first; modules whose parameters others read."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    read_directly: set[str] = field(default_factory=set)


def capture(model: nn.Module) -> Capture:
    """Find the islands of a model.

    >>> [island.path for island in capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).islands]
    ['']
    """
    found = Capture()
    with quietly():
        _explore(shadow(model), "", found, set())
    return found


def observe(model: nn.Module, inputs: Sequence[Tensor], *, meta_only: bool = False) -> Observed:
    """Run the model once in eval mode and note every call of a conv, norm or block.

    The run is made on the meta device, which computes nothing; where the model needs values it is made for real.

    Raises:
        CaptureError: the model does not accept the inputs.
    """
    try:
        return _observe(shadow(model, to_meta), [to_meta(t) for t in inputs])
    except Exception as error:
        if meta_only:
            raise _refusal(model, inputs, error) from error
    try:
        return _observe(shadow(model), inputs)
    except Exception as error:
        raise _refusal(model, inputs, error) from error


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Give every name of every module; a module that is reached twice has two."""
    found: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        found[module].append(name)
    return {module: tuple(paths) for module, paths in found.items()}


def kept_aside(model: nn.Module) -> dict[nn.Module, str]:
    """Find modules that are also kept where torch does not look: in plain lists, dicts and attributes."""
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

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _TORCHS_OWN:
                look(value, f"{name}.{attribute}".removeprefix("."), 3)
    return found


def shadow(model: Model, cast: Callable[[Tensor], Tensor] | None = None) -> Model:
    """Copy a model's structure; share its parameters and clone its buffers, or `cast` each of them once.

    Raises:
        CaptureError: the model holds something that Python cannot copy.
    """

    def stand_in(tensor: Tensor) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        if cast is None:
            return tensor if is_parameter else tensor.detach().clone()
        made = cast(tensor.detach())
        return nn.Parameter(made, tensor.requires_grad) if is_parameter else made

    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if isinstance(own, FunctionType) and any(True for _ in module.children()):
            raise CaptureError(
                f"{name or 'the model'} has a function in place of its forward, which would run the original in a copy",
                todo="Make it a method of a class.",
            )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise CaptureError(
            f"{lazy[0]} has no shape yet",
            todo="Run the model once, so that its lazy layers get their shapes, and save it.",
        )
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): stand_in(t) for t in (*model.parameters(), *model.buffers(), *held)}
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    memo |= {id(group): group for group in groups}  # a connection to other processes has no copy
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {where(error)}", todo="Move what Python cannot copy out of the module."
        ) from error


def duplicate(model: Model) -> Model:
    """Copy a model with its tensors.

    Raises:
        CaptureError: the model holds something that Python cannot copy.
    """
    return shadow(model, torch.clone)


def in_mode(model: Model, training: bool) -> Model:
    """Set the mode of a model of ours, and return it; a person's own `train` may return nothing."""
    model.train(training)
    return model


def to_meta(tensor: Tensor) -> Tensor:
    """Keep shape and dtype, and no numbers."""
    return tensor.to("meta")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run the person's code so that its prints go to stderr, its warnings nowhere, and its random draws are undone."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)


def where(error: BaseException) -> str:
    """Say in one line what was raised, and where in the person's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS_AND_TORCHS)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0].rstrip('.')}{place}"


def how_to_call(model: nn.Module, given: int) -> str:
    """Say what to do where a model did not run on as many inputs as were given."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty]
    if len(needed) > max(given, 1):
        return f"It takes {' and '.join(needed)}; from Python: example=({', '.join(needed)}), tensors or shapes."
    if len(dtypes := {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}) > 1:
        return f"Its parameters are {' and '.join(sorted(dtypes))}; if that is why, save it in one dtype."
    return "Give the shape that it was made for: --input 1,3,224,224."


class _Tracer(fx.Tracer):
    """Stops at convs and norms, whatever their subclass, and at surgeon's blocks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block | _ConvNd | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _explore(module: nn.Module, path: str, found: Capture, seen: set[nn.Module]) -> None:
    if module in seen or isinstance(module, Block | _ConvNd) or not any(map(is_conv, module.modules())):
        return
    seen.add(module)
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        graph = _trace(module, is_root=not path)
        if isinstance(graph, fx.Graph):
            found.islands.append(Island(path, graph))
            return
        found.opaque.append(Opaque(path, graph))
    for name, child in module.named_children():
        _explore(child, f"{path}.{name}" if path else name, found, seen)


def _trace(module: nn.Module, *, is_root: bool) -> fx.Graph | str:
    """Trace in both modes; the graph, or why there is none."""
    defaults = {
        p.name: p.default
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    ways = [defaults] if is_root or not defaults else [defaults, {}]
    try:
        graphs = [_trace_once(module, mode, way) for way in ways for mode in (True, False)]
    except Exception as error:
        return f"tracing stopped: {where(error)}"
    for i, other in enumerate(graphs[1:]):
        if difference := _difference(graphs[0], other):
            when = "with and without its optional arguments" if i else "in train and eval mode"
            return f"the graph is not the same {when}, first at {difference}"
    return graphs[0]


def _trace_once(module: nn.Module, training: bool, arguments: dict[str, Any]) -> fx.Graph:
    """Trace, and take away what tracing and `forward` leave on modules, so that every trace begins alike."""
    with _restoring(module):
        return _Tracer().trace(in_mode(module, training), concrete_args=dict(arguments))


@contextlib.contextmanager
def _restoring(module: nn.Module) -> Iterator[None]:
    """Put back every attribute, buffer, parameter and submodule that is set on a module or on one inside it."""
    holders = [
        holder for one in module.modules() for holder in (vars(one), one._buffers, one._parameters, one._modules)
    ]
    before = [dict(holder) for holder in holders]
    try:
        yield
    finally:
        for holder, known in zip(holders, before, strict=True):
            holder.clear()
            holder.update(known)


def _difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """Name the first step in which two graphs differ, or None."""
    ours, theirs = _steps(one), _steps(other)
    for (name, step), (_, counterpart) in zip(ours, theirs, strict=False):
        if step != counterpart:
            return f"'{name}'"
    if len(ours) != len(theirs):
        return f"step {min(len(ours), len(theirs)) + 1}"
    return None


def _steps(graph: fx.Graph) -> list[tuple[str, Any]]:
    """List what a graph does, without what tracing adds to guard the arguments that it was given."""
    guards = (torch._assert, fx._symbolic_trace._assert_is_none)
    nodes = [n for n in graph.nodes if n.op != "placeholder" and n.target not in guards]
    nodes = [n for n in nodes if not (n.target is operator.eq and all(u.target in guards for u in n.users))]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    label = {n: f"%{i}" for i, n in enumerate(nodes)} | {n: f"input {i}" for i, n in enumerate(inputs)}
    steps = []
    for node in nodes:
        kwargs = {k: v for k, v in node.kwargs.items() if not (k == "training" and node.target in _DROPOUTS)}
        args = fx.map_arg((node.args, kwargs), lambda n: label[n])
        steps.append((str(node.name), (node.op, node.target, args)))
    return steps


def _observe(model: nn.Module, inputs: Sequence[Tensor]) -> Observed:
    seen, running = Observed(), _Running(model)

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.stack.append(module)

    def end(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            running.stack.pop()
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if given and isinstance(out, Tensor):
                seen.calls[name].append(Call(tuple(given[0].shape), tuple(out.shape)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Block | _ConvNd | _NormBase):
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end(name), with_kwargs=True)
    given = _as_stored(model, inputs)
    with quietly(), running:
        in_mode(model, False)(*given)
    seen.read_directly = running.read_directly
    return seen


class _Running(TorchFunctionMode):
    """Notes convs and norms whose parameters go into a computation that is not in a call of their own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[nn.Module] = []
        self.read_directly: set[str] = set()
        self.owners = {
            id(parameter): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, _ConvNd | _NormBase)
            for parameter in module.parameters(recurse=False)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # what gives no tensor has only looked at the shape or the dtype
            for value in (*args, *(kwargs or {}).values()):
                name, owner = self.owners.get(id(value), ("", None))
                if owner is not None and not any(module is owner for module in self.stack):
                    self.read_directly.add(name)
        return result


def _as_stored(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cast floating point inputs to the dtype of the model's first parameter."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


def _refusal(model: nn.Module, inputs: Sequence[Tensor], error: Exception) -> CaptureError:
    shapes = ", ".join("×".join(map(str, t.shape)) for t in inputs)
    return CaptureError(
        f"the model does not run on an input of {shapes}: {where(error)}", todo=how_to_call(model, len(inputs))
    )
