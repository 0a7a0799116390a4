"""An fx graph ↔ plain data.

A pickled fx.GraphModule holds Python source that runs when the file is opened. A `Rewritten` (`rewritten`) holds its
graph as data instead: steps with the names of functions from the explicit lists below, of submodules that are
registered below the module, and of their parameters, buffers and plain values. When it is opened, every name is looked
up and every word is checked before Python is made of it.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from inspect import Signature
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from surgeon._torch_compat import ASSERT_IS_NONE
from surgeon.analysis import signatures
from surgeon.analysis.places import said
from surgeon.conv import streams
from surgeon.nn import LaterFormatError

Data = dict[str, Any]
_FORMAT = 2
REMEMBERS = "remembers"  # in the meta of the output: what the forward sets on a module
SURROUNDINGS = "surroundings"  # in the meta of a step: what its module has entered before it, such as torch.no_grad
_PART = re.compile(r"[\w/:-]+")  # of a module's path: it stands in quotes in the Python that is made
_OPERATORS = (
    "add iadd sub isub mul imul truediv itruediv floordiv mod pow neg getitem eq ne lt le gt ge and_ or_ matmul"
)
_TORCH = (
    "abs adaptive_avg_pool1d add addmm arange avg_pool1d bmm cat chunk clamp concat conv2d cos cumsum div einsum "
    "eq exp flatten floor ge gt hardshrink index_select le log lt matmul max max_pool2d maximum mean min minimum "
    "mul ne neg norm permute pow prelu relu relu_ repeat_interleave reshape roll rsqrt selu sigmoid sin softmax split "
    "sqrt square squeeze stack std sub sum swapaxes tanh transpose unbind unflatten unsqueeze var where zeros_like "
    "ones_like _assert"
)
_FUNCTIONAL = (
    "adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu channel_shuffle conv2d "
    "conv_transpose2d dropout dropout2d elu feature_alpha_dropout fold gelu glu group_norm hardsigmoid hardswish "
    "hardtanh hardtanh_ instance_norm interpolate layer_norm leaky_relu leaky_relu_ linear local_response_norm "
    "log_softmax logsigmoid lp_pool2d max_pool2d mish normalize pad pixel_shuffle pixel_unshuffle prelu relu "
    "relu6 relu_ scaled_dot_product_attention selu sigmoid silu softmax softplus softsign tanh threshold unfold "
    "upsample"
)
_METHODS = (
    "abs add add_ chunk clamp clamp_ clone contiguous cos detach dim div div_ double exp expand expand_as flatten "
    "float flip half index_select masked_fill matmul max mean min mul mul_ narrow neg new_zeros numel permute pow "
    "relu relu_ repeat reshape roll rsqrt sigmoid sigmoid_ sin size softmax split sqrt square squeeze std sub sub_ "
    "sum t tanh to transpose type_as unbind unflatten unfold unsqueeze var view view_as"
)
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
_STREAMS = (
    *(streams.split, streams.join, streams.interleave, streams.low_pass, streams.pool, streams.take),
    *(streams.lift_to, streams.crop_to, streams.halve_to, streams.add_into),
)


def _named(module: Any, prefix: str, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(module, name) for name in names.split() if hasattr(module, name)}


# The first name of a function is the one that is written; F.conv2d is torch.conv2d.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_named(operator, "operator", _OPERATORS),
    **_named(torch, "torch", _TORCH),
    **_named(F, "torch.nn.functional", _FUNCTIONAL),
    **{f"streams.{function.__name__}": function for function in _STREAMS},
    **({} if ASSERT_IS_NONE is None else {"torch.fx.assert_is_none": ASSERT_IS_NONE}),
    "collections.OrderedDict": OrderedDict,
    "getattr": builtins.getattr,  # of a tensor's shape, dtype and the like only
}
_NAMES = {id(function): name for name, function in reversed(FUNCTIONS.items())}
METHODS = frozenset(_METHODS.split())
# Names of functions in format 1 that have changed since: they said where the code was.
_RENAMED = {
    "surgeon.streams.add_into": "streams.add_into",
    "surgeon.streams.crop_to": "streams.crop_to",
    "surgeon.streams.interleave": "streams.interleave",
    "surgeon.streams.join": "streams.join",
    "surgeon.streams.lift_to": "streams.lift_to",
    "surgeon.streams.low_pass": "streams.low_pass",
    "surgeon.streams.pool": "streams.pool",
    "surgeon.streams.split": "streams.split",
    "surgeon.streams.take": "streams.take",
    "torch.fx._symbolic_trace._assert_is_none": "torch.fx.assert_is_none",
}


def unwritable(module: nn.Module, graph: fx.Graph) -> str | None:
    """Say which step of a graph cannot be kept as data."""
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*"):
            return f"its forward takes {node.target}"
        if node.op == "call_function" and id(node.target) not in _NAMES:
            return f"{said(node)} calls {getattr(node.target, '__name__', node.target)}, which is not on surgeon's list"
        if node.op == "call_method" and node.target not in METHODS:
            return f"{said(node)} calls the method {node.target}, which is not on surgeon's list"
        if node.op in ("call_module", "get_attr") and not _is_path(str(node.target)):
            return f"'{node.target}' holds more than letters, digits and '_-/:'"
        if node.op in ("call_module", "get_attr") and not _reaches(module, node.op, str(node.target)):
            is_call = node.op == "call_module"
            return f"{said(node)} {'calls' if is_call else 'reads'} what is not registered in its module"
        try:
            _encoded((node.args, node.kwargs))
            if node.target is getattr:
                _checked(node.args)
        except ValueError as error:
            return f"{said(node)} {error}"
    return None


def check(module: nn.Module, program: Data) -> None:
    """Make sure that the steps of a graph reach nothing but what is registered below its module.

    Raises:
        ValueError: a step reaches anything else, or is none that surgeon writes; nothing has been run.
    """
    for node in decode(program).nodes:
        if node.op in ("call_module", "get_attr") and not _reaches(module, node.op, str(node.target)):
            what = "calls" if node.op == "call_module" else "reads"
            raise ValueError(f"the graph in the file {what} {node.target!r}, which is not registered in its module")


def encode(graph: fx.Graph, signature: Signature | None = None) -> Data:
    """Write a graph as plain data, and the signature of the forward that it stands for."""
    inputs, steps, output = [], [], None
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append([node.name, *(_encoded(value) for value in node.args)])
        elif node.op == "output":
            output = _encoded(node.args[0])
        else:
            target = _NAMES[id(node.target)] if node.op == "call_function" else str(node.target)
            steps.append([node.name, node.op, target, _encoded(list(node.args)), _encoded(dict(node.kwargs))])
    written = {} if signature is None else {"signature": signatures.write(signature, _encoded)}
    return {"format": _FORMAT, "inputs": inputs, "steps": steps, "output": output, **written}


def decode(program: Mapping[str, Any]) -> fx.Graph:
    """Make the graph that `encode` wrote.

    Raises:
        ValueError: it holds a name or a word that `encode` does not write; nothing has been run.
    """
    if program.get("format") != _FORMAT:
        later = type(program.get("format")) is int and program["format"] > _FORMAT
        raise (LaterFormatError if later else ValueError)(
            f"the graph in the file has format {program.get('format')!r}, and this surgeon reads up to {_FORMAT}"
        )
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, *default in program["inputs"]:
        args = tuple(_decoded(value, nodes) for value in default)
        nodes[name] = graph.create_node("placeholder", _word(name), args, name=_word(name))
    for name, op, target, args, kwargs in program["steps"]:
        found = _target(op, target)
        made_args, made_kwargs = tuple(_decoded(args, nodes)), _decoded(kwargs, nodes)
        if found is getattr:
            _checked(made_args)
        made_kwargs = {_word(key): value for key, value in made_kwargs.items()}
        nodes[name] = graph.create_node(op, found, made_args, made_kwargs, name=_word(name))
    graph.output(_decoded(program["output"], nodes))
    return graph


def signature_of(program: Mapping[str, Any]) -> Signature:
    """Give the signature of the forward that a graph stands for.

    Raises:
        ValueError: it is not what `encode` writes.
    """
    written = program.get("signature", [[name, "either", *default] for name, *default in program["inputs"]])
    found = signatures.read(written, _word, lambda value: _decoded(value, {}))
    if len(found.parameters) != len(program["inputs"]):
        raise ValueError("the graph in the file has another number of inputs than its signature")
    return found


def compiled(program: Mapping[str, Any]) -> Callable[..., Any]:
    """Make a Python function `forward(self, …)` of a graph, as fx.GraphModule does."""
    return function_of(decode(program))


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<surgeon graph>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


def upgraded(program: Data) -> Data:
    """Turn a graph of format 1 into one of today's; nothing in it has been checked."""
    if program.get("format") != 1:
        return program
    steps = [[name, op, _RENAMED.get(target, target), *rest] for name, op, target, *rest in program["steps"]]
    return program | {"format": _FORMAT, "steps": steps}


def _target(op: str, target: str) -> Any:
    if op == "call_function" and target in FUNCTIONS:
        return FUNCTIONS[target]
    if op == "call_method" and target in METHODS:
        return target
    if op in ("call_module", "get_attr") and _is_path(target):
        return target
    raise ValueError(f"the graph in the file has a step {op} {target!r}, which surgeon does not write")


def _is_path(target: str) -> bool:
    return all(_PART.fullmatch(part) and not part.startswith("__") for part in target.split("."))


def _word(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise ValueError(f"the graph in the file holds {name!r} in place of a name")
    return name


def _checked(args: tuple[Any, ...]) -> None:
    """Make sure that `getattr` looks at no more than the shape of a value."""
    if len(args) != 2 or args[1] not in _ATTRIBUTES:
        raise ValueError(f"reads the attribute {args[1] if len(args) > 1 else ''!r} of a value")


_PLAIN = (bool, int, float, str, type(None))


def _encoded(value: Any) -> Any:
    """Write one argument; anything but a plain value becomes a dict with one key that says what it is."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encoded(part) for part in value]}
    if isinstance(value, list):
        return [_encoded(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[_encoded(key), _encoded(part)] for key, part in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encoded(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    raise ValueError(f"has a {type(value).__name__} among its arguments")


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [_decoded(part, nodes) for part in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"the graph in the file has an argument {value!r}")
    [(what, content)] = value.items()
    if what == "node":
        return nodes[content]
    if what == "tuple":
        return tuple(_decoded(part, nodes) for part in content)
    if what == "dict":
        return {_decoded(key, nodes): _decoded(part, nodes) for key, part in content}
    if what == "slice":
        return slice(*(_decoded(part, nodes) for part in content))
    if what == "ellipsis":
        return Ellipsis
    if what == "torch" and isinstance(found := getattr(torch, _word(content), None), torch.dtype | torch.memory_format):
        return found
    raise ValueError(f"the graph in the file has an argument {value!r}")


def _reaches(root: nn.Module, op: str, target: str) -> bool:
    """Whether a step calls a registered submodule, or reads a parameter, a buffer or a plain value of one.

    Python looks into a module's `__dict__` and its class before it looks among what is registered, so a name that is
    there too would lead elsewhere.
    """
    *path, name = target.split(".")
    holder = _submodule(root, path)
    if op == "call_module":
        return holder is not None and _submodule(holder, [name]) is not None
    if holder is None or hasattr(type(holder), name):
        return False
    if name in vars(holder):
        return _is_plain(vars(holder)[name])
    return isinstance(holder._parameters.get(name, holder._buffers.get(name)), torch.Tensor)


def _submodule(root: nn.Module, path: Sequence[str]) -> nn.Module | None:
    """Look a registered submodule up, part by part."""
    found: nn.Module | None = root
    for part in path:
        if found is None or part in vars(found) or hasattr(type(found), part):
            return None
        found = found._modules.get(part)
    return found if isinstance(found, nn.Module) else None


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, or data that can do nothing."""
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list, torch.Size) and all(map(_is_plain, value))
    return type(value) in (*_PLAIN, torch.dtype, torch.device, torch.Tensor, nn.Parameter)
