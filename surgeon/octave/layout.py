"""How the channels of a feature map lie, and what a step of a graph is: the words in which `rules/` speak."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from surgeon.analysis.obstacles import custom_call
from surgeon.conv.streams import Ranges

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the channels of a value lie: how many, which are low, and at which resolution those are.

    `low` is empty for a plain map. `is_fine`: its low channels have been pooled to the resolution of the high ones by a
    step of the network, and lie beside them. `is_point`: it is one pixel, so it goes with maps of any size.
    """

    channels: int | None = None
    low: Ranges = ()
    is_fine: bool = False
    is_point: bool = False

    @property
    def is_octave(self) -> bool:
        return bool(self.low) and not self.is_fine

    @property
    def plain(self) -> Layout:
        return replace(self, low=(), is_fine=False)


@dataclass(frozen=True, slots=True)
class Flow:
    """What comes out of a step: the layout; why streams that went in had to be joined; operands to be low-passed."""

    layout: Layout
    seam: str | None = None
    low_pass: tuple[fx.Node, ...] = ()


Layouts = Mapping[fx.Node, Layout]
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a graph, with the modules that the graph can call."""

    node: fx.Node
    modules: Modules

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def module(self) -> nn.Module | None:
        """The module that it calls."""
        return self.modules[str(self.node.target)] if self.node.op == "call_module" else None

    @property
    def is_customised(self) -> bool:
        """Whether it calls a module with hooks or a forward of its own, which would see streams where it saw a map."""
        return self.module is not None and custom_call(self.module, "it") is not None

    @property
    def given(self) -> list[Any]:
        """Its arguments, those by position first."""
        return [*self.node.args, *self.node.kwargs.values()]

    @property
    def operand(self) -> fx.Node | None:
        """What a step with one feature map works on: its first argument, or the one it is given by name."""
        return self.given[0] if self.given and isinstance(self.given[0], fx.Node) else None

    @property
    def operands(self) -> list[Any]:
        """The two things that a step such as a sum is of."""
        return self.given[:2]

    def calls(
        self,
        kinds: Collection[type[nn.Module]] = (),
        functions: Collection[Any] = (),
        methods: Collection[str] = (),
    ) -> bool:
        """Whether it calls a module of just these classes, one of these functions, or one of these methods."""
        if self.module is not None:
            return type(self.module) in kinds
        known: Collection[Any] = {"call_function": functions, "call_method": methods}.get(self.node.op, ())
        return self.node.target in known

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """What it is given at this place, or by this name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def layout_before(self, layouts: Layouts) -> Layout:
        """How the channels of its operand lie."""
        return Layout() if self.operand is None else layouts[self.operand]

    @property
    def is_in_place(self) -> bool:
        """Whether it changes what it is given."""
        node = self.node
        if self.module is not None:
            return bool(getattr(self.module, "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        ends_so = getattr(node.target, "__name__", "").endswith("_")
        has_flag = any(value is True for value in node.args[1:])  # as F.relu(x, True)
        return node.target in _IN_PLACE or ends_so or bool(node.kwargs.get("inplace")) or has_flag
