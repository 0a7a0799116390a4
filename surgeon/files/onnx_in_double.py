"""An ONNX graph computed in float64, so that it can be judged apart from its rounding.

onnx's own reference evaluator says what every step means. Convs and poolings, which take it minutes, are computed by
torch. Whatever the graph says in float32 becomes float64: the numbers that it stores, and casts.

Its float constants are numbers of the file, too. Those that are not whole, and were rounded to store them, are given
beside its weights, so that the caller can move them by their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_average_pool import AveragePool_19 as _AveragePool
from onnx.reference.ops.op_max_pool import MaxPool as _MaxPool
from torch import Tensor

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class InDouble:
    """A graph that computes in float64 with whatever numbers it is given."""

    def __init__(self, model: ModelProto) -> None:
        own = ModelProto()
        own.CopyFrom(model)
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}  # float numbers by name: initializers, constants, settings
        self._settings: dict[str, tuple[int, str]] = {}  # name → which node, which of its attributes
        self._hoist_(own.graph)
        for nodes in (own.graph.node, *(function.node for function in own.functions)):
            _widen_(nodes)
        self._outputs = [one.name for one in own.graph.output]
        self._evaluator = ReferenceEvaluator(own, new_ops=[Conv, ConvTranspose, MaxPool, AveragePool])

    def run(self, numbers: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the outputs with these numbers in place of `tensors`."""
        feeds = {name: _array(tensor) for name, tensor in (*numbers.items(), *given.items())}
        for name, (at, attribute) in self._settings.items():
            setattr(self._evaluator.rt_nodes_[at], attribute, float(feeds.pop(name)))
        with np.errstate(all="ignore"):
            made = self._evaluator.run(self._outputs, feeds)
        return [torch.from_numpy(np.array(one)) for one in made]

    def _hoist_(self, graph: GraphProto) -> None:
        """Take float numbers out of the main graph: initializers, constants, and settings of its nodes."""
        stay = [_widened(one) for one in graph.initializer if not self._is_number(one.name, one)]
        del graph.initializer[:]
        graph.initializer.extend(stay)
        nodes = []
        for node in graph.node:
            value = next((one.t for one in node.attribute if one.name == "value"), None)
            is_taken = node.op_type == "Constant" and value is not None and self._is_number(node.output[0], value)
            nodes += [] if is_taken else [node]
        kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        for at, node in enumerate(graph.node):
            for one in node.attribute:
                if one.type == AttributeProto.FLOAT and node.op_type != "Constant" and one.f % 1:
                    name = f"{node.output[0]}:{one.name}"
                    self.tensors[name] = np.array(one.f, dtype=np.float32)
                    self._settings[name] = (at, one.name)

    def _is_number(self, name: str, tensor: TensorProto) -> bool:
        """Note a tensor of floats; a single whole number, such as an exponent of 2, stays where it is."""
        if tensor.data_type not in _FLOATS | {TensorProto.DOUBLE}:
            return False
        array = numpy_helper.to_array(tensor)
        if array.size == 1 and float(array.reshape(())) % 1 == 0:
            return False
        self.tensors[name] = array
        return True


def floats_of(model: ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Give the weights of a graph: its initializers of floats."""
    floats = [one for one in model.graph.initializer if one.data_type in _FLOATS | {TensorProto.DOUBLE}]
    return {one.name: numpy_helper.to_array(one) for one in floats}


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array; NumPy has no bfloat16 of its own."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _widen_(nodes: Any) -> None:
    """Let casts and constants below these nodes be float64."""
    for node in nodes:
        for one in node.attribute:
            if one.name in ("to", "dtype") and one.type == AttributeProto.INT and one.i in _FLOATS:
                one.i = TensorProto.DOUBLE
            elif one.type == AttributeProto.TENSOR:
                one.t.CopyFrom(_widened(one.t))
            elif one.name == "value_float":  # of a constant
                one.name, one.type = "value", AttributeProto.TENSOR
                one.t.CopyFrom(numpy_helper.from_array(np.array(one.f, dtype=np.float64)))
            for graph in _graphs(one):
                _widen_(graph.node)
                for tensor in graph.initializer:
                    tensor.CopyFrom(_widened(tensor))


def _widened(tensor: TensorProto) -> TensorProto:
    """Give floats as float64, and other numbers as they are."""
    if tensor.data_type not in _FLOATS:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    made: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return made


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class Conv(OpRun):
    def _run(self, x: Any, w: Any, b: Any = None, **how: Any) -> tuple[Any]:
        axes = x.ndim - 2
        stride, dilation = how["strides"] or [1] * axes, how["dilations"] or [1] * axes
        pads = _pads(x.shape[2:], w.shape[2:], stride, dilation, how)
        padded = F.pad(_tensor(x), _for_torch(pads, axes))
        bias = None if b is None else _tensor(b)
        return (_CONVS[axes](padded, _tensor(w), bias, stride, 0, dilation, how["group"]).numpy(),)


class ConvTranspose(OpRun):
    def _run(self, x: Any, w: Any, b: Any = None, **how: Any) -> tuple[Any]:
        axes = x.ndim - 2
        stride, dilation = how["strides"] or [1] * axes, how["dilations"] or [1] * axes
        more, wanted = how["output_padding"] or [0] * axes, how["output_shape"]
        if wanted or how["auto_pad"] not in (None, "", "NOTSET", "VALID"):
            raise NotImplementedError("a ConvTranspose whose padding follows from its output")
        pads = how["pads"] or [0] * 2 * axes
        bias = None if b is None else _tensor(b)
        made = _TRANSPOSED[axes](_tensor(x), _tensor(w), bias, stride, 0, 0, how["group"], dilation)
        ends = [one - pads[axes + i] for i, one in enumerate(more)]  # what is added behind, or cut off
        if bias is not None and any(end > 0 for end in ends):
            raise NotImplementedError("a ConvTranspose with more output padding than padding")
        return (F.pad(made, _for_torch([*(-one for one in pads[:axes]), *ends], axes)).numpy(),)


class MaxPool(_MaxPool):
    op_domain = ""

    def _run(self, x: Any, **how: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if len([name for name in self.onnx_node.output if name]) > 1:
            made: tuple[Any, ...] = super()._run(x, **how)  # type: ignore[no-untyped-call]
            return made
        axes = x.ndim - 2
        kernel, stride = how["kernel_shape"], how["strides"] or [1] * axes
        dilation = how["dilations"] or [1] * axes
        pads = _pads(x.shape[2:], kernel, stride, dilation, how)
        given, padding = _tensor(x), pads[:axes]
        if pads[:axes] != pads[axes:] or any(2 * p > k for p, k in zip(pads, kernel, strict=False)):
            given, padding = F.pad(given, _for_torch(pads, axes), value=-torch.inf), [0] * axes
        return (_MAX[axes](given, kernel, stride, padding, dilation, bool(how["ceil_mode"])).numpy(),)


class AveragePool(_AveragePool):
    op_domain = ""

    def _run(self, x: Any, **how: Any) -> tuple[Any, ...]:  # type: ignore[override]
        axes = x.ndim - 2
        kernel, stride = how["kernel_shape"], how["strides"] or [1] * axes
        pads = _pads(x.shape[2:], kernel, stride, [1] * axes, how)
        is_even = pads[:axes] == pads[axes:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
        if not is_even or any(one != 1 for one in how["dilations"] or []):
            made: tuple[Any, ...] = super()._run(x, **how)  # type: ignore[no-untyped-call]
            return made
        counts = bool(how["count_include_pad"])
        return (_AVERAGE[axes](_tensor(x), kernel, stride, pads[:axes], bool(how["ceil_mode"]), counts).numpy(),)


def _pads(sides: Any, kernel: Any, stride: Any, dilation: Any, how: Mapping[str, Any]) -> list[int]:
    """Give the padding before every axis, then behind every axis, as ONNX does."""
    axes, auto = len(sides), how["auto_pad"]
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return list(how["pads"] or [0] * 2 * axes)
    wide = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    triples = zip(sides, wide, stride, strict=True)
    whole = [max((-(-side // step) - 1) * step + size - side, 0) for side, size, step in triples]
    less = [one // 2 for one in whole]
    more = [one - half for one, half in zip(whole, less, strict=True)]
    return [*less, *more] if auto == "SAME_UPPER" else [*more, *less]


def _for_torch(pads: list[int], axes: int) -> list[int]:
    """Order padding as F.pad takes it: the last axis first, before and behind."""
    return [pads[i + behind] for i in reversed(range(axes)) for behind in (0, axes)]
