"""What the steps of a graph give: tensors whose channels lie on an axis, parameters, and parts of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from surgeon.analysis.shapes import Shapes
from surgeon.channels.orders import Axis, Order, Orders, Segment, fix
from surgeon.octave.layout import Step


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that a step gives: the axis of its channels, and which one of its axes that is."""

    axis: Axis
    dim: int


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or buffer that a step reads; which of its axes are channels is said by who reads it."""

    tensor: Tensor


Known = Value | Held | tuple[Value, ...] | None  # a tuple: the parts of a split. None: nothing that has an order


class Values:
    """What the steps of one island's graph give, as far as it is known."""

    def __init__(self, orders: Orders, shapes: Shapes) -> None:
        self.orders, self.shapes = orders, shapes
        self.values: dict[fx.Node, Known] = {}

    def fix(self, known: Known, why: str) -> None:
        if isinstance(known, Held):
            self.orders.fix_tensor(known.tensor, why)
        elif known is not None:
            for one in (known,) if isinstance(known, Value) else known:
                fix(one.axis, why)

    def shape(self, value: Any) -> tuple[int, ...] | None:
        return self.shapes.get(value.name) if isinstance(value, fx.Node) else None

    def axis_at(self, value: Any, back: int, size: int) -> Axis | None:
        """Give the axis that lies so far from the last one, which channels have to be; None where others are."""
        shape, known = self.shape(value), self.values.get(value) if isinstance(value, fx.Node) else None
        if shape is None or len(shape) < back or shape[-back] != size:
            return None
        if isinstance(known, Value):
            return known.axis if known.dim == len(shape) - back else None
        if isinstance(known, Held):
            return self.orders.of(known.tensor, known.tensor.dim() - back)
        return [Segment(Order(size, "it reads what the network is given, or what could not be followed"))]

    def as_value(self, value: Any) -> Value | None:
        """Give a value with one axis of channels; of a tensor that is held, the only axis that is longer than one."""
        known = self.values.get(value) if isinstance(value, fx.Node) else None
        if isinstance(known, Held):
            dims = [dim for dim, size in enumerate(known.tensor.shape) if size > 1]
            return Value(self.orders.of(known.tensor, dims[0]), dims[0]) if len(dims) == 1 else None
        return known if isinstance(known, Value) else None

    def fixed(self, module: nn.Module, step: Step) -> Known:
        """Fix all tensors of a module that is called in a way that could not be followed; nothing is known then."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.orders.fix_tensor(tensor, f"{step.said} is called on something that could not be followed")
        return None


Handler = Callable[[Values, Step], Known]


@dataclass(frozen=True, slots=True)
class Table:
    """Which steps a file of `steps/` knows: modules of exactly these classes, functions, methods; others by a test."""

    modules: Mapping[type[nn.Module], Handler] = field(default_factory=dict)
    functions: Mapping[Any, Handler] = field(default_factory=dict)
    methods: Mapping[str, Handler] = field(default_factory=dict)
    others: tuple[tuple[Callable[[Step], bool], Handler], ...] = ()

    def of(self, step: Step) -> Handler | None:
        """Find a step by what it calls."""
        if step.module is not None:
            return self.modules.get(type(step.module))
        if step.node.op == "call_method":
            return self.methods.get(str(step.node.target))
        return self.functions.get(step.node.target) if step.node.op == "call_function" else None
