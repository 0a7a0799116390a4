"""ONNX files: written by torch's exporter, run by onnxruntime on the CPU.

A file of a stranger is parsed and checked before it is run: what it holds besides its program lies in its own folder,
and no library of operators is loaded for it. In float64, which onnxruntime has no convs for, onnx's reference evaluator
computes (`files/onnx_in_double.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import ModelError, StoreError
from surgeon.files.exports.base import Captured, Export, Port, Program
from surgeon.files.exports.compiled import flat
from surgeon.models.copies import where
from surgeon.models.sandbox import quietly

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_SYMBOL = re.compile(r"\b[su]\d+\b")  # what torch calls a side that varies
_FIRST_OPSET = 18  # which torch writes; older ones would be converted, which fails for many operators
_LARGEST = 2**31 - 2**20  # bytes of a protobuf file, with something left for its graph
_OWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft")  # of onnxruntime itself
_TO_HOST = "Save it as one file: onnx.save(onnx.load('model.onnx'), 'whole.onnx')."


class Onnx(Export):
    """A graph of ONNX operators."""

    name = "ONNX"
    suffixes = (".onnx",)
    extra = "onnx"
    needs = ("onnx", "onnxscript", "onnxruntime")
    dtypes = (torch.float32, torch.float16)  # in which onnxruntime has convs on the CPU
    most_bytes: ClassVar[int | None] = _LARGEST

    def check_opset(self, opset: int | None) -> None:
        from onnx.defs import onnx_opset_version

        if opset is not None and not _FIRST_OPSET <= opset <= onnx_opset_version():
            raise StoreError(
                f"opset {opset} is none that can be written",
                todo=f"Give one from {_FIRST_OPSET} to {onnx_opset_version()}, or leave out --opset.",
            )

    def write(self, captured: Captured, path: Path, *, opset: int | None) -> dict[str, Any]:
        model = _exported(captured, opset)
        _tidy_(model, captured)
        path.write_bytes(model.SerializeToString(deterministic=True))
        steps = Counter(node.op_type for node in model.graph.node)
        own = next(one.version for one in model.opset_import if one.domain == "")
        return {"opset": own, "operators": dict(steps.most_common())}

    def open(self, path: Path) -> Program:
        return _Onnx(_checked(_read(path), path), path)

    def add(self, path: Path, captured: Captured, said: Mapping[str, str]) -> None:
        """Append the metadata: protobuf reads two messages in a row as one, so that no byte of the program changes."""
        from onnx import ModelProto

        more = ModelProto()
        for key, value in said.items():
            more.metadata_props.add(key=key, value=value)
        with path.open("ab") as file:
            file.write(more.SerializeToString(deterministic=True))

    def said(self, path: Path) -> dict[str, str]:
        return _said(_read(path))


class _Onnx(Program):
    """A graph that was read from a file."""

    kind = "ONNX"

    def __init__(self, model: ModelProto, path: Path) -> None:
        from surgeon.files.onnx_in_double import InDouble, as_tensor, floats_of

        self._model, self._path = model, path
        self._names = {one.name for one in model.graph.initializer}
        self._double: InDouble | None = None
        found = floats_of(model)
        try:
            self._double = InDouble(model)
            found = self._double.tensors
        except Exception as error:  # an operator that onnx itself does not compute, such as one of onnxruntime's own
            self._why = where(error)
        self.tensors = {name: as_tensor(array) for name, array in found.items()}
        self.inputs = tuple(_port(one) for one in model.graph.input if one.name not in self._names)
        self.outputs = tuple(map(_port, model.graph.output))
        self.said = _said(model)

    @cached_property
    def _session(self) -> Any:
        return _session_of(self._model, self._path)

    def run(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = dict(zip((port.name for port in self.inputs), flat(self, args, kwargs), strict=True))
        wide = torch.float64
        stored = any(tensor.dtype == wide for tensor in self.tensors.values())
        is_wide = any(one.dtype == wide for one in (*tensors.values(), *given.values()))
        if is_wide and not stored and not any(port.dtype == wide for port in self.inputs):
            if self._double is None:
                raise NotImplementedError(f"onnx cannot compute it: {self._why}")
            made = self._double.run(tensors, given)
        else:
            made = [torch.from_numpy(one) for one in self._fed(tensors, given)]
        return made[0] if len(made) == 1 else tuple(made)

    def _fed(self, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[Any]:
        """Run onnxruntime, with other weights in place of the stored ones if there are any."""
        moved = {name: tensor for name, tensor in tensors.items() if not _is_same(tensor, self.tensors[name])}
        session = _session_of(_with(self._model, moved), self._path) if moved else self._session
        with quietly():
            made: list[Any] = session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in given.items()})
        return made


def _exported(captured: Captured, opset: int | None) -> ModelProto:
    """Let torch make the graph; constants are folded, and norms stay beside their convs, so that no weight changes."""
    with quietly():
        try:
            from onnxscript import optimizer

            program = torch.onnx.export(
                captured.program,
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                output_names=list(captured.outputs),
                opset_version=opset,
            )
            assert program is not None
            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
            made: ModelProto = program.model_proto
        except Exception as error:  # whatever torch or onnxscript says
            raise StoreError(
                f"torch cannot write the network as ONNX: {_of_step(error)}",
                todo="Write a .pt2, .pt or .safetensors file, or give another --opset.",
            ) from error
    return made


def _of_step(error: BaseException) -> str:
    """Name the step that ONNX has no operator for, if that is why."""
    at: BaseException | None = error
    while at is not None:
        if found := re.search(
            r"No (?:ONNX|decompositions|translation) \w+ .*?(?:for|of) ([^\s]*\S+::\S+|<[^>]*>)", str(at)
        ):
            return f"ONNX has nothing for its step {found[1].strip('<>.')}"
        at = at.__cause__
    return where(error)


def _tidy_(model: ModelProto, captured: Captured) -> None:
    """Name sides that vary, and leave out where in the user's files the steps come from."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                named = _SYMBOL.sub(lambda found: captured.sides.get(found[0], found[0]), side.dim_param)
                side.dim_param = named
        del value.metadata_props[:]
    graphs: Iterable[Any] = (model.graph, *model.functions)
    for graph in graphs:
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for one in model.graph.initializer:
        del one.metadata_props[:]
    del model.metadata_props[:]


def _read(path: Path) -> ModelProto:
    """Parse a file, and read the weights beside it; nothing is run.

    Raises:
        ModelError: it is no ONNX file, or wants something from elsewhere.
    """
    from google.protobuf.message import DecodeError
    from onnx import ModelProto
    from onnx.external_data_helper import load_external_data_for_model

    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is no ONNX file, or is damaged", todo="Copy or export it again.") from error
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path} holds no graph", todo="Copy or export it again.")
    domains = sorted({node.domain for node in _nodes(model)} - {*_OWN_DOMAINS, *(f.domain for f in model.functions)})
    if domains:
        raise ModelError(
            f"{path} needs operators of {domains[0]}, which are code that surgeon does not load",
            todo="Export the network with ONNX's own operators.",
        )
    outside = [one for one in _tensors(model) if one.data_location == 1]  # EXTERNAL
    if outside:
        for one in outside:
            _check_beside(path, one)
        try:
            load_external_data_for_model(model, str(path.parent))
        except Exception as error:  # whatever is wrong with offsets and lengths
            raise ModelError(
                f"the weights of {path} cannot be read: {where(error)}", todo="Export it again."
            ) from error
    return model


def _checked(model: ModelProto, path: Path) -> ModelProto:
    """Make sure that all tensors in a file have as many bytes as their shapes say.

    Raises:
        ModelError: one has not, or is of a kind that onnx does not know.
    """
    from onnx import numpy_helper

    for one in _tensors(model):
        try:
            numpy_helper.to_array(one)
        except Exception as error:  # whatever onnx says
            raise ModelError(
                f"{path} is damaged: its tensor {one.name[:100]!r} cannot be read: {where(error)}",
                todo="Copy or export it again.",
            ) from error
    return model


def _check_beside(path: Path, tensor: TensorProto) -> None:
    """Make sure that weights outside the file lie beside it, in a file of their own, and all fit in one."""
    said = {one.key: one.value for one in tensor.external_data}
    name = said.get("location", "")
    beside = path.parent / name
    if not name or "/" in name or "\\" in name or name in (".", "..") or "\0" in name or Path(name).is_absolute():
        raise ModelError(f"{path} takes weights from {name!r}, which does not lie beside it", todo=_TO_HOST)
    if beside.is_symlink() or not beside.is_file():
        raise ModelError(f"the weights of {path} are missing: there is no plain file {beside}", todo=_TO_HOST)
    if beside.stat().st_size > _LARGEST:
        raise ModelError(f"{beside} has more than 2 GiB, which surgeon does not open", todo="Compare it elsewhere.")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Give every tensor in a model, wherever it lies."""
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for one in node.attribute:
            yield from (*([one.t] if one.HasField("t") else []), *one.tensors)


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    waiting = [model.graph]
    waiting += [graph for function in model.functions for node in function.node for graph in _inner(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in _inner(node)]


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _inner(node: NodeProto) -> list[GraphProto]:
    return [graph for one in node.attribute for graph in (*([one.g] if one.HasField("g") else []), *one.graphs)]


def _session_of(model: ModelProto, path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime says
        raise ModelError(f"onnxruntime cannot run {path}: {where(error)}", todo="Export it again.") from error


def _with(model: ModelProto, numbers: Mapping[str, Tensor]) -> ModelProto:
    """Copy a model with other weights; settings and constants stay."""
    from onnx import ModelProto, numpy_helper

    made = ModelProto()
    made.CopyFrom(model)
    for one in made.graph.initializer:
        if one.name in numbers:
            one.CopyFrom(numpy_helper.from_array(numbers[one.name].detach().cpu().numpy(), one.name))
    return made


def _said(model: ModelProto) -> dict[str, str]:
    return {one.key: one.value for one in model.metadata_props}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _port(value: Any) -> Port:
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.tensor_type
    try:
        dtype = torch.from_numpy(np.empty(0, tensor_dtype_to_np_dtype(kind.elem_type))).dtype
    except (TypeError, KeyError):  # text, sequences, bfloat16
        dtype = None
    if not kind.HasField("shape"):
        return Port(value.name, dtype, None)
    sides = [side.dim_value if side.HasField("dim_value") else side.dim_param or "?" for side in kind.shape.dim]
    return Port(value.name, dtype, tuple(sides))
