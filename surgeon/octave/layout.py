"""How the channels of a feature map are laid out, and what a step of a graph is: the vocabulary of `rules/`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from surgeon.analysis import own_norms, places
from surgeon.analysis.obstacles import custom_call
from surgeon.conv.streams import Ranges
from surgeon.models.copies import kind_of

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the channels of a value are laid out: how many there are, which are low, and at which resolution.

    `low` is empty for a plain map. `is_fine`: a step of the network has pooled both, and the low channels have the
    resolution of the high ones. `is_point`: it is one pixel, so it can be combined with maps of any size; a number is
    a point of one channel. `parts`: it is several maps, and these are the channels of each.
    """

    channels: int | None = None
    low: Ranges = ()
    is_fine: bool = False
    is_point: bool = False
    parts: Ranges = ()

    @property
    def is_octave(self) -> bool:
        return bool(self.low) and not self.is_fine

    @property
    def plain(self) -> Layout:
        return replace(self, low=(), is_fine=False, parts=())

    def scales(self, other: Layout) -> bool:
        """Whether this is one number for all of another map, or one for each of its channels."""
        return self.is_point and (self.channels == 1 or (self.channels is not None and self.channels == other.channels))


def broadcast(layouts: Iterable[Layout]) -> Layout:
    """The layout of what plain values give together: one with a single channel stretches to the channels of another."""
    found = list(layouts)
    counts = {one.channels for one in found}
    wide = counts - {None, 1}
    channels = wide.pop() if len(wide) == 1 else (1 if counts == {1} else None)
    return Layout(channels, is_point=bool(found) and all(one.is_point for one in found))


@dataclass(frozen=True, slots=True)
class Flow:
    """The result of a step: the layout; why streams that went in had to be joined; operands to be low-passed."""

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
    def said(self) -> str:
        """What messages call it."""
        return places.said(self.node, None if self.module is None else kind_of(self.module))

    @property
    def said_of_all(self) -> str:
        """What messages call all steps of its kind."""
        return places.said_of_all(self.node, None if self.module is None else kind_of(self.module))

    @property
    def module(self) -> nn.Module | None:
        """The module that it calls."""
        return self.modules[str(self.node.target)] if self.node.op == "call_module" else None

    @property
    def need(self) -> str:
        """Why two streams are joined for it, where no rule says more."""
        if (norm := self.norm) is None:
            return f"{self.said} needs the whole map"
        path, kind = norm
        return f"{path} is a {kind.__name__}, {own_norms.in_words(kind)}: the two streams have to be joined for it"

    @property
    def need_of_all(self) -> str:
        """Where two streams end at it, in words that steps of its kind share."""
        if (norm := self.norm) is None:
            return f"in {self.said_of_all}, which needs the whole map"
        return f"in {places.with_article(norm[1])}, {own_norms.in_words(norm[1])}"

    @property
    def norm(self) -> tuple[str, type[nn.Module]] | None:
        """The path and class of the norm that it is, or is a step of, as far as that is what it computes."""
        return None if self.is_customised else own_norms.norm_of(self.node, self.modules)

    @property
    def is_customised(self) -> bool:
        """Whether it calls a module with hooks or a forward of its own, which would see streams where it saw a map."""
        return self.module is not None and custom_call(self.module, "it") is not None

    @property
    def given(self) -> list[Any]:
        """Its arguments: first those by position, then those by name."""
        return [*self.node.args, *self.node.kwargs.values()]

    @property
    def operand(self) -> fx.Node | None:
        """The feature map that the step works on: its first argument, or the one it is given by name."""
        first = self.operands[0]
        return first if isinstance(first, fx.Node) else None

    @property
    def operands(self) -> list[Any]:
        """The two operands of a step such as a sum, of which the second may be None."""
        by_name = self.node.kwargs
        return [self.argument(0, "input", next(iter(by_name.values()), None)), self.argument(1, "other")]

    @property
    def others(self) -> list[fx.Node]:
        """The values that it reads besides its operand."""
        return [value for value in self.node.all_input_nodes if value is not self.operand]

    def is_read_later(self, value: fx.Node) -> bool:
        """Whether a step after this one reads a value."""
        later = self.node.next
        while later.op != "root":
            if later in value.users:
                return True
            later = later.next
        return False

    def calls(
        self,
        kinds: Collection[type[nn.Module]] = (),
        functions: Collection[Any] = (),
        methods: Collection[str] = (),
    ) -> bool:
        """Whether it calls a module of exactly these classes, one of these functions, or one of these methods."""
        if self.module is not None:
            return type(self.module) in kinds
        known: Collection[Any] = {"call_function": functions, "call_method": methods}.get(self.node.op, ())
        return self.node.target in known

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """The argument at this place, or with this name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def layout_before(self, layouts: Layouts) -> Layout:
        """The layout of its operand."""
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
