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

import builtins
import contextlib
import copy
import functools
import inspect
import operator
import random
import sys
import traceback
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgeon.blocks import Block, Operator
from surgeon.errors import CaptureError
from surgeon.graph import SURROUNDINGS, Rewritten
from surgeon.inputs import Draw, Inputs, call_of

Model = TypeVar("Model", bound=nn.Module)
_OURS_AND_TORCHS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_TORCHS_OWN = vars(nn.Module()).keys()  # _modules, _parameters, hooks
FOLLOWS_MODE = "follows_mode"  # in the meta of a functional dropout whose flag is self.training
_A_TENSOR = torch.empty(0)
_GIVE_NUMBERS = ("size", "dim", "ndimension", "numel", "item", "tolist")  # of a tensor's methods
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
    """What a run showed: the calls by name, in order of the first; modules whose parameters others read.

    `functional` are the calls of F.conv2d that no conv makes, by the name of the parameter that is their weight.
    """

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    functional: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    read_directly: set[str] = field(default_factory=set)


def capture(model: nn.Module, inputs: Inputs | None = None) -> Capture:
    """Find the islands of a model; `inputs` tell which of its optional arguments it is called with.

    >>> [island.path for island in capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).islands]
    ['']
    """
    found = Capture()
    with quietly():
        _explore(shadow(model), "", found, set(), inputs or Inputs())
    return found


def observe(model: nn.Module, inputs: Inputs | Sequence[Tensor], *, meta_only: bool = False) -> Observed:
    """Run the model once in eval mode and note every call of a conv, norm or block.

    The run is made on the meta device, which computes nothing; where the model needs values it is made for real.

    Raises:
        CaptureError: the model does not accept the inputs.
    """
    call = call_of(inputs)
    try:
        return _observe(shadow(model, to_meta), call.map(to_meta))
    except Exception as error:
        if meta_only:
            raise _refusal(model, call, error) from error
    try:
        return _observe(shadow(model), call)
    except Exception as error:
        raise _refusal(model, call, error) from error


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


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


def _encloses(function: FunctionType, modules: set[nn.Module]) -> bool:
    return any(isinstance(one, nn.Module) and one in modules for one in _enclosed(function))


def _enclosed(function: FunctionType) -> list[Any]:
    """List what the variables of a closure hold."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            found.append(cell.cell_contents)
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

    modules = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, FunctionType):
                continue
            if any(True for _ in module.children()) if attribute == "forward" else _encloses(value, modules):
                raise CaptureError(
                    f"{name or 'the model'} has a function for its {attribute}, which would run the original in a copy",
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
        made = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {where(error)}", todo="Move what Python cannot copy out of the module."
        ) from error
    for (name, module), twin in zip(model.named_modules(), made.modules(), strict=False):
        if _kind(twin) is not _kind(module) or twin.training != module.training:
            raise CaptureError(
                f"{name or 'the model'} cannot be copied: copy.deepcopy gives it another class or mode",
                todo="Give the network that it was made from.",
            )
    return made


def _kind(module: nn.Module) -> type:
    """Give the class of a module; every GraphModule has one of its own, below that which names its kind."""
    kind = type(module)
    return kind.__mro__[1] if isinstance(module, fx.GraphModule) and kind.__name__ == "GraphModuleImpl" else kind


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


def how_to_call(model: nn.Module, given: Inputs) -> str:
    """Say what to do where a model did not run on what was given."""
    signature = inspect.signature(model.forward)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in signature.parameters.items() if p.kind not in variadic}
    needed = [name for name, p in named.items() if p.default is p.empty]
    try:
        signature.bind(*given.args, **given.kwargs)
    except TypeError:
        words = ";".join(n if named[n].kind is inspect.Parameter.POSITIONAL_ONLY else f"{n}=1,3,8,8" for n in needed)
        takes = " and ".join(needed) or "no input that has to be named"
        optional = ", ".join(name for name in named if name not in needed)
        return f"It takes {takes}{f' (and may take {optional})' * bool(optional)}: --input '{words}', say."
    if len(dtypes := {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}) > 1:
        return f"Its parameters are {' and '.join(sorted(dtypes))}; if that is why, save it in one dtype."
    return "Give the input that it was made for: --input 1,3,224,224, or a file, or file.py:make_inputs."


class _Tracer(fx.Tracer):
    """Stops at convs and norms, whatever their subclass, and at surgeon's blocks.

    `stops_early`: also at modules in which there is nothing of these, such as those that drop paths at random.
    `given`: arguments that are known; the others stand for tensors.
    """

    def __init__(self, given: Mapping[str, Any], *, stops_early: bool = False) -> None:
        super().__init__()
        self.stops_early = stops_early
        self.given = given
        self.outside = _surroundings()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if entered := [name for name, state in _surroundings().items() if state != self.outside[name]]:
            node.meta[SURROUNDINGS] = entered[0]
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Operator | _ConvNd | _BatchNorm | torch.jit.ScriptModule) or (
            self.stops_early and not _is_of_interest(m)
        ):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """Keep an OrderedDict, which fx would turn into a dict: some networks return one."""
        if type(a) is not OrderedDict:
            return super().create_arg(a)
        return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})


def _surroundings() -> dict[str, Any]:
    """What steps run in that is not in a graph, by what enters it."""
    devices = ("cpu", "cuda")
    return {
        "a gradient mode of its own (torch.no_grad, or a Function with a backward)": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ),
        "an autocast": [(torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in devices],
        "a checkpoint": torch._C._autograd._top_saved_tensors_default_hooks(True),
    }


@contextlib.contextmanager
def _surrounded(training: bool) -> Iterator[None]:
    """Trace within other states in train and in eval mode, so that whatever `forward` enters is a change in one.

    Nothing is computed; autocast on a GPU can be switched on where there is none.
    """
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", training)
    try:
        with torch.set_grad_enabled(training):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextlib.contextmanager
def _typed(tracer: _Tracer) -> Iterator[None]:
    """Answer `isinstance(x, Tensor)`, which a person's forward may ask of a placeholder, as for what it stands for."""
    ask = builtins.isinstance

    def answer(value: Any, kinds: Any) -> bool:
        if type(value) is fx.Proxy and value.tracer is tracer and _asks_for_itself(sys._getframe(1)):
            return ask(_stand_in(value.node, tracer.given, value), kinds)
        return ask(value, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = ask


def _asks_for_itself(frame: FrameType | None) -> bool:
    """Whether a person's code asks, or torch.is_tensor on its behalf."""
    if frame is not None and frame.f_code is torch.is_tensor.__code__:
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_OURS_AND_TORCHS)


def _stand_in(node: fx.Node, given: Mapping[str, Any], unknown: Any) -> Any:
    """Give something of the kind that a step computes: a tensor, unless it looks at a shape or into an argument."""
    if node.op == "placeholder":
        return unknown if str(node.target).startswith("*") else given.get(str(node.target), _A_TENSOR)
    if node.target is getattr or node.target in _GIVE_NUMBERS:
        return unknown
    if node.target is operator.getitem and isinstance(container := node.args[0], fx.Node):
        value = _stand_in(container, given, unknown)
        if value is unknown or isinstance(value, Tensor):
            return value
        try:
            return value[node.args[1]]
        except (LookupError, TypeError):
            return unknown
    operands = [_stand_in(operand, given, unknown) for operand in node.all_input_nodes]
    return unknown if operands and all(value is unknown for value in operands) else _A_TENSOR


def _explore(module: nn.Module, path: str, found: Capture, seen: set[nn.Module], inputs: Inputs) -> None:
    if module in seen or isinstance(module, Operator | _ConvNd) or not _may_convolve(module):
        return
    seen.add(module)
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        graph = _trace(module, None if path else inputs)
        if isinstance(graph, fx.Graph):
            found.islands.append(Island(path, graph))
            return
        found.opaque.append(Opaque(path, graph))
    for name, child in module.named_children():
        _explore(child, f"{path}.{name}" if path else name, found, seen, inputs)


def _is_of_interest(module: nn.Module) -> bool:
    return _may_convolve(module) or any(isinstance(part, _NormBase) for part in module.modules())


def _may_convolve(module: nn.Module) -> bool:
    """Whether there is a conv or a block in a module, or a parameter that could be the weight of F.conv2d."""
    if any(isinstance(part, Operator | _ConvNd) for part in module.modules()):
        return True
    return any(parameter.dim() == 4 for parameter in module.parameters())


def _trace(module: nn.Module, inputs: Inputs | None) -> fx.Graph | str:
    """Trace in both modes, the whole model as `inputs` call it; the graph, or why there is none.

    What cannot be followed into every module can perhaps be followed around those that hold no conv and no norm.
    """
    if isinstance(module, Rewritten):
        return module.graph
    found = _trace_in_both_modes(module, inputs, stops_early=False)
    if isinstance(found, str):
        around = _trace_in_both_modes(module, inputs, stops_early=True)
        found = around if isinstance(around, fx.Graph) else found
    return found


def _trace_in_both_modes(module: nn.Module, inputs: Inputs | None, *, stops_early: bool) -> fx.Graph | str:
    given = _arguments(module, inputs or Inputs())
    defaults = {name: value for name, value in given.items() if not Inputs((value,)).has_tensors}
    ways = [defaults] if inputs is not None or not defaults else [defaults, {}]
    tensors = {name: value for name, value in given.items() if name not in defaults}
    tensors = pytree.tree_map_only(Draw, lambda _: _A_TENSOR, tensors)
    try:
        graphs = [_trace_once(module, mode, way, tensors, stops_early) for way in ways for mode in (True, False)]
    except Exception as error:
        return f"tracing stopped: {where(error)}"
    if node := next((n for n in graphs[0].nodes if _is_open(n)), None):
        return f"what it does depends on which optional inputs it is given, in '{node.name}'"
    for i, other in enumerate(graphs[1:]):
        if difference := _difference(graphs[0], other):
            when = "with and without its optional arguments" if i else "in train and eval mode"
            return f"the graph is not the same {when}, first at {difference}"
    _mark_(graphs[0], graphs[1])
    return graphs[0]


def _mark_(training: fx.Graph, evaluating: fx.Graph) -> None:
    """Note which functional dropouts follow the mode of their module, and what was seen only in eval mode."""
    for one, other in zip(_essential(training), _essential(evaluating), strict=True):
        if one.target in _DROPOUTS:
            one.meta[FOLLOWS_MODE] = one.kwargs.get("training") != other.kwargs.get("training")
        if SURROUNDINGS in other.meta:
            one.meta.setdefault(SURROUNDINGS, other.meta[SURROUNDINGS])


def _arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Give the arguments of a call as far as they are known: those that it leaves out are their defaults."""
    signature = inspect.signature(module.forward)
    parameters = signature.parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        given = signature.bind_partial(*inputs.args, **inputs.kwargs).arguments
    except TypeError:  # the run will tell
        return defaults
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return defaults | {name: value for name, value in given.items() if name in named}


def _is_open(node: fx.Node) -> bool:
    """Whether a step looks something up that need not be there: whatever it is, tracing believes that it is."""
    return node.op == "call_method" and node.target in ("get", "pop", "setdefault")


def _trace_once(
    module: nn.Module, training: bool, constants: dict[str, Any], given: Mapping[str, Any], stops_early: bool
) -> fx.Graph:
    """Trace, and take away what tracing and `forward` leave on modules, so that every trace begins alike."""
    with _restoring(module), _surrounded(training):
        tracer = _Tracer(given, stops_early=stops_early)
        with _typed(tracer):
            return tracer.trace(in_mode(module, training), concrete_args=dict(constants))


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
    """List what a graph does."""
    nodes = _essential(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    label = {n: f"%{i}" for i, n in enumerate(nodes)} | {n: f"input {i}" for i, n in enumerate(inputs)}
    steps = []
    for node in nodes:
        kwargs = {k: v for k, v in node.kwargs.items() if not (k == "training" and node.target in _DROPOUTS)}
        args = fx.map_arg((node.args, kwargs), lambda n: label[n])
        steps.append((str(node.name), (node.op, node.target, args)))
    return steps


def _essential(graph: fx.Graph) -> list[fx.Node]:
    """List the steps of a graph without what tracing adds to guard the arguments that it was given."""
    guards = (torch._assert, fx._symbolic_trace._assert_is_none)
    nodes = [n for n in graph.nodes if n.op != "placeholder" and n.target not in guards]
    return [n for n in nodes if not (n.target is operator.eq and all(u.target in guards for u in n.users))]


def _observe(model: nn.Module, inputs: Inputs) -> Observed:
    seen = Observed()
    running = _Running(model, seen)

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
    given = inputs.cast_for(model)
    with quietly(), running:
        given.call(in_mode(model, False))
    return seen


class _Running(TorchFunctionMode):
    """Notes convs and norms whose parameters go into a computation that is not in a call of their own."""

    def __init__(self, model: nn.Module, seen: Observed) -> None:
        super().__init__()
        self.stack: list[nn.Module] = []
        self.seen = seen
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
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
