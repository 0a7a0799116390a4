"""One module → its graph, or the reason why no graph of it can be trusted.

Symbolic tracing records one run of `forward` with placeholders instead of tensors. It cannot follow everything
(control flow on values), and what it records is one run: `self.training` and the defaults of optional arguments are
baked in. So a module is traced in both modes, and, unless it is the whole model, with its optional arguments both left
out and open. If all graphs are equal, they are what it computes.

Graphs are read here, not run, so the training flag of a functional dropout does not count as a difference. A context
that a step runs in and that no graph shows (torch.no_grad, autocast, a checkpoint) is noted in the meta of the step.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgeon._torch_compat import ASSERTIONS, ConvNd, NormBase, pytree, saved_tensor_hooks
from surgeon.analysis import places
from surgeon.analysis.program import REMEMBERS, SURROUNDINGS
from surgeon.analysis.rewritten import graph_of
from surgeon.blocks import Operator, norms
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, is_users, where
from surgeon.models.draw import Draw
from surgeon.models.sandbox import Guard, drawn_from, draws, gradients_and_autocast, tracing

FOLLOWS_MODE = "follows_mode"  # in the meta of a functional dropout whose flag is self.training
_A_TENSOR = torch.empty(0)
_GIVE_NUMBERS = ("size", "dim", "ndimension", "numel", "item", "tolist")  # of a tensor's methods
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def trace(module: nn.Module, inputs: Inputs | None) -> fx.Graph | str:
    """Trace in both modes, the whole model as `inputs` call it; returns the graph, or why there is none.

    If tracing into every module fails, it is tried again without entering those that hold no conv and no norm.
    """
    if (known := graph_of(module)) is not None:
        return known
    found = _traced(module, inputs, stops_early=False)
    if isinstance(found, str):
        around = _traced(module, inputs, stops_early=True)
        found = around if isinstance(around, fx.Graph) else found
    return found


def trace_in_eval_mode(module: nn.Module, inputs: Inputs | None) -> fx.Graph | str:
    """Trace as `trace` does, but in eval mode alone: for what is made for inference, whatever it does in training."""
    return _traced(module, inputs, stops_early=False, modes=(False,))


def may_convolve(module: nn.Module) -> bool:
    """Whether there is a conv or a block in a module, or a parameter that could be the weight of F.conv2d."""
    if any(isinstance(part, Operator | ConvNd) for part in module.modules()):
        return True
    return any(parameter.dim() == 4 for parameter in module.parameters())


def _traced(
    module: nn.Module, inputs: Inputs | None, *, stops_early: bool, modes: tuple[bool, ...] = (True, False)
) -> fx.Graph | str:
    given = _arguments(module, inputs or Inputs())
    defaults = {name: value for name, value in given.items() if not Inputs((value,)).has_tensors}
    ways = [defaults] if inputs is not None or not defaults else [defaults, {}]
    tensors = {name: value for name, value in given.items() if name not in defaults}
    tensors = pytree.tree_map_only(Draw, lambda _: _A_TENSOR, tensors)
    known = drawn_from()
    try:
        graphs = [_trace_once(module, mode, way, tensors, stops_early) for way in ways for mode in modes]
        if drawn_from() != known and draws(lambda: _trace_once(module, True, ways[0], tensors, stops_early)):
            return "its forward draws random numbers by itself, and a graph would always do what the first ones said"
    except Exception as error:
        return f"tracing stopped: {where(error)}"
    if node := next((n for n in graphs[0].nodes if _is_open(n)), None):
        return f"what it does depends on which optional inputs it is given, in {places.said(node)}"
    for i, other in enumerate(graphs[1:]):
        if difference := _difference(graphs[0], other):
            when = "in train and eval mode" if not i and len(modes) > 1 else "with and without its optional arguments"
            return f"the graph is not the same {when}, first at {difference}"
    _mark_(graphs[0], graphs[len(modes) - 1])
    if remembers := next((n.meta[REMEMBERS] for one in graphs for n in one.nodes if REMEMBERS in n.meta), None):
        _output_of(graphs[0]).meta[REMEMBERS] = remembers
    return graphs[0]


class _Placeholder(fx.Proxy):
    """Stands for a value, and notes what only a value can answer: code may catch that it is none, and go on.

    Nothing is noted of an index, since torch itself asks for it, and goes on rightly.
    """

    tracer: _Tracer

    def __len__(self) -> int:
        self.tracer.asked = "how many parts something has"
        return super().__len__()

    def __int__(self) -> int:
        raise self._asked()

    def __float__(self) -> float:
        raise self._asked()

    def __hash__(self) -> int:  # of a size, say, that is looked up in a dict
        if is_users(sys._getframe(1).f_code.co_filename):
            self.tracer.asked = "whether a mapping or a set holds something"
        return id(self)

    def _asked(self) -> TypeError:
        self.tracer.asked = "which number something is"
        return TypeError("which number it is, is not known while a graph is made")


class _Tracer(fx.Tracer):
    """Stops at convs and norms, whatever their subclass, and at surgeon's blocks; sees its own thread only.

    `stops_early`: also at modules in which there is nothing of these, such as those that drop paths at random.
    `given`: arguments that are known; the others stand for tensors. `guard`: what keeps fx's patches to this thread.
    """

    def __init__(self, given: Mapping[str, Any], guard: Guard, *, stops_early: bool = False) -> None:
        super().__init__()
        self.stops_early = stops_early
        self.guard, self.thread = guard, threading.get_ident()
        self.given = given
        self.outside = _surroundings()
        self.asked: str | None = None  # what was asked of a placeholder that only a value can answer

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Placeholder(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked = "whether something is true"
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.asked = "how many parts something has"
        return super().iter(obj)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, placeholders = super().create_args_for_root(*args, **kwargs)
        return self.guard(function), placeholders  # fx calls it once its patches are made

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:  # the call came before the guard was in place
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(
        self,
        kind: str,
        target: fx.node.Target,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        if target is getattr and name is None and isinstance(args[1], str):
            name = args[1]  # x.shape is a step called 'shape', not 'getattr_1'
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if entered := [name for name, state in _surroundings().items() if state != self.outside[name]]:
            node.meta[SURROUNDINGS] = entered[0]
        places.note_(node, self.scope.module_path, _trace_once.__code__)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Operator | ConvNd) or norms.is_batch_norm(m) or (self.stops_early and not _is_of_interest(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """Keep an OrderedDict, which fx would turn into a dict: some networks return one."""
        if type(a) is not OrderedDict:
            return super().create_arg(a)
        return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})


def _surroundings() -> dict[str, Any]:
    """The contexts in which steps run and which no graph shows, by what enters them.

    A trace in train mode has gradients and an autocast, one in eval mode has neither: so whatever `forward` enters is a
    change in one of the two.
    """
    devices = ("cpu", "cuda")
    return {
        "a gradient mode of its own (torch.no_grad, or a Function with a backward)": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ),
        "an autocast": [(torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in devices],
        "a checkpoint": saved_tensor_hooks(),
    }


def _answer(ask: Callable[[Any, Any], bool], value: Any, kinds: Any) -> bool:
    """Answer `isinstance(x, Tensor)`, which a user's forward may ask of a placeholder, as for its value."""
    tracer = value.tracer if type(value) is _Placeholder else None
    if type(tracer) is _Tracer and _is_users_question(sys._getframe(2)):
        return ask(_stand_in(value.node, tracer.given, value), kinds)
    return ask(value, kinds)


def _is_users_question(frame: FrameType | None) -> bool:
    """Whether the user's code asks, or torch.is_tensor on its behalf."""
    if frame is not None and frame.f_code is torch.is_tensor.__code__:
        frame = frame.f_back
    return frame is not None and is_users(frame.f_code.co_filename)


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
    if getattr(node.target, "__module__", "") == "_operator" and node.all_input_nodes:  # h // 2, say
        return _stand_in(node.all_input_nodes[0], given, unknown)
    return _A_TENSOR


def _mark_(training: fx.Graph, evaluating: fx.Graph) -> None:
    """Note which functional dropouts follow the mode of their module, and what was seen only in eval mode."""
    for one, other in zip(_essential(training), _essential(evaluating), strict=True):
        if one.target in _DROPOUTS:
            one.meta[FOLLOWS_MODE] = one.kwargs.get("training") != other.kwargs.get("training")
        if SURROUNDINGS in other.meta:
            one.meta.setdefault(SURROUNDINGS, other.meta[SURROUNDINGS])


def _arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Give the arguments of a call as far as they are known: those that it leaves out have their defaults."""
    signature = inspect.signature(module.forward)
    parameters = signature.parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        given = signature.bind_partial(*inputs.args, **inputs.kwargs).arguments
    except TypeError:  # the run will report it
        return defaults
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return defaults | {name: value for name, value in given.items() if name in named}


def _is_open(node: fx.Node) -> bool:
    """Whether a step looks up something that may be missing: tracing always takes it to be there."""
    return node.op == "call_method" and node.target in ("get", "pop", "setdefault")


def _trace_once(
    module: nn.Module, training: bool, constants: dict[str, Any], given: Mapping[str, Any], stops_early: bool
) -> fx.Graph:
    """Trace, and remove what tracing and `forward` leave on modules, so that every trace begins in the same state."""
    with (
        tracing(_answer) as guard,
        _restoring(module) as changed,
        gradients_and_autocast(training),
        _calling_functions_of_graphs(module),
    ):
        tracer = _Tracer(given, guard, stops_early=stops_early)
        graph = tracer.trace(in_mode(module, training), concrete_args=dict(constants))
        if tracer.asked is not None:
            raise fx.proxy.TraceError(f"its forward asks {tracer.asked}, and goes on where nobody can tell")
    if changed:
        _output_of(graph).meta[REMEMBERS] = changed[0]
    return graph


def _output_of(graph: fx.Graph) -> fx.Node:
    last: fx.Node = next(reversed(graph.nodes))
    return last


@contextlib.contextmanager
def _restoring(module: nn.Module) -> Iterator[list[str]]:
    """Put back every attribute, buffer, parameter and submodule that is set on a module or on one inside it.

    Gives a list that, at the end, names those that had another value before.
    """
    holders = [
        (path, holder)
        for path, one in module.named_modules()
        for holder in (vars(one), one._buffers, one._parameters, one._modules)
    ]
    before, changed = [{name: (one, _age(one)) for name, one in holder.items()} for _, holder in holders], list[str]()
    try:
        yield changed
    finally:
        for (path, holder), known in zip(holders, before, strict=True):
            for name, (value, age) in known.items():
                if name != "training" and (holder.get(name, known) is not value or _age(value) != age):
                    changed.append(f"{path}.{name}".removeprefix("."))
            holder.clear()
            holder.update({name: value for name, (value, _) in known.items()})


def _age(value: object) -> int:
    """Count how often a tensor was changed in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


@contextlib.contextmanager
def _calling_functions_of_graphs(module: nn.Module) -> Iterator[None]:
    """Let functions that a GraphModule calls be steps of the trace, as they are of its graph, and not be entered."""
    spaces = [type(one).forward.__globals__ for one in module.modules() if isinstance(one, fx.GraphModule)]
    before = [dict(space) for space in spaces]
    for space in spaces:
        space.update((name, _as_step(value)) for name, value in space.items() if _is_called_by_a_graph(value))
    try:
        yield
    finally:
        for space, known in zip(spaces, before, strict=True):
            space.update(known)


def _is_called_by_a_graph(value: object) -> bool:
    """Whether something in the scope of a graph's code is a function that torch.fx would enter: not torch's own."""
    return isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch.")


def _as_step(function: FunctionType) -> Callable[..., Any]:
    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = next((one for one in pytree.tree_leaves((args, kwargs)) if type(one) in (fx.Proxy, _Placeholder)), None)
        if given is None:
            return function(*args, **kwargs)
        return given.tracer.create_proxy("call_function", function, args, kwargs)

    return step


def _difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """Name the first step in which two graphs differ, or None."""
    ours, theirs = _steps(one), _steps(other)
    for (node, step), (_, counterpart) in zip(ours, theirs, strict=False):
        if step != counterpart:
            return places.said(node)
    if len(ours) != len(theirs):
        return f"step {min(len(ours), len(theirs)) + 1}"
    return None


def _steps(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """List what a graph does."""
    nodes = _essential(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    label = {n: f"%{i}" for i, n in enumerate(nodes)} | {n: f"input {i}" for i, n in enumerate(inputs)}
    steps = []
    for node in nodes:
        kwargs = {k: v for k, v in node.kwargs.items() if not (k == "training" and node.target in _DROPOUTS)}
        args = fx.map_arg((node.args, kwargs), lambda n: label[n])
        steps.append((node, (node.op, node.target, args)))
    return steps


def _essential(graph: fx.Graph) -> list[fx.Node]:
    """List the steps of a graph without what tracing adds to guard the arguments that it was given."""
    nodes = [n for n in graph.nodes if n.op != "placeholder" and n.target not in ASSERTIONS]
    return [n for n in nodes if not (n.target is operator.eq and all(u.target in ASSERTIONS for u in n.users))]


def _is_of_interest(module: nn.Module) -> bool:
    return may_convolve(module) or any(isinstance(one, NormBase) or norms.is_frozen(one) for one in module.modules())
