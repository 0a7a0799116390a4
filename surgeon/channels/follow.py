"""Network → orders of channels: which axes of which tensors have to be permuted together, and what stays as it is.

All islands of a network are followed. What goes in or out of an island keeps its order, since the code around it is not
known; so does what a module holds that is also reached from elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgeon.analysis.islands import Island
from surgeon.analysis.network import Network
from surgeon.analysis.readers import owners
from surgeon.channels.orders import Key, Orders, starts
from surgeon.channels.steps import handler_of
from surgeon.channels.values import Held, Known, Values
from surgeon.models.aliases import copied_together
from surgeon.octave.layout import Step


@dataclass(frozen=True, slots=True)
class Place:
    """Where an order lies in a tensor: on this axis, from `start` on, `each` numbers for every channel.

    `rows`: in these rows only (of the first axis). `names` are all keys of the tensor in the network's state dict.
    """

    names: tuple[str, ...]
    axis: int
    start: int = 0
    each: int = 1
    rows: tuple[int, int] | None = None


@dataclass(slots=True)
class Group:
    """An order of channels, and all its places; `fixed` is why it has to stay as it is."""

    size: int
    fixed: str | None
    places: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Channels:
    """The orders of channels in a network."""

    groups: list[Group]
    _axes: Mapping[Key, list[tuple[Group, int, int]]]

    def on(self, tensor: Tensor, axis: int) -> list[tuple[Group, int, int]]:
        """Give the orders on an axis of a tensor, in their order: each with its start, and its numbers per channel."""
        return self._axes.get(Key(id(tensor), axis), [])


def channels_of(network: Network) -> Channels:
    """Follow the channels through a network; without an example input no shapes are known, and nothing is found.

    >>> from surgeon.models.call import Inputs
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> found = channels_of(Network(model, Inputs((torch.zeros(1, 3, 4, 4),))))
    >>> [[(place.names[0], place.axis) for place in one.places] for one in found.groups if not one.fixed]
    [[('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]]
    """
    orders, names = Orders(), _names(network.model)
    for island in network.islands:
        _follow(network, island, orders)
    _fix_shared(network, orders, names)
    groups: dict[int, Group] = {}
    axes = {key: list(_placed(key, orders, names, groups)) for key in orders.axes}
    return Channels(list(groups.values()), axes)


_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "get_device"}
_SHAPES = {"shape", "dtype", "device", "ndim", "is_cuda", "layout"}


def _follow(network: Network, island: Island, orders: Orders) -> None:
    root = network.model.get_submodule(island.path)
    modules = dict(root.named_modules(remove_duplicate=False))
    values = Values(orders, network.shapes.get(island.path, {}))
    where = type(root).__name__ if island.path else "the network"
    for node in island.graph.nodes:
        step = Step(node, modules)
        if node.op == "output":
            _fix_what(step, values, f"it is what {where} gives")
        elif node.op == "get_attr":
            holder, _, name = str(node.target).rpartition(".")
            found = getattr(modules.get(holder), name, None)
            values.values[node] = Held(found) if isinstance(found, Tensor) else None
        elif node.op != "placeholder" and not _asks_for_shape(step):
            values.values[node] = _given(step, values)


def _given(step: Step, values: Values) -> Known:
    """Say what a step gives; if that is not known, what it reads stays in its order."""
    handler = handler_of(step)
    made = None if handler is None else handler(values, step)
    if made is None:
        _fix_what(step, values, f"{step.said} is a step that channels cannot be followed through")
    return made


def _fix_what(step: Step, values: Values, why: str) -> None:
    for value in step.node.all_input_nodes:
        values.fix(values.values.get(value), why)


def _asks_for_shape(step: Step) -> bool:
    node = step.node
    if node.op == "call_method":
        return str(node.target) in _SHAPE_METHODS
    return node.target is getattr and str(node.args[1]) in _SHAPES


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Give all keys of every tensor in the state dict of a model."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return {key: tuple(names) for key, names in found.items()}


def _fix_shared(network: Network, orders: Orders, names: Mapping[int, tuple[str, ...]]) -> None:
    """Fix tensors that something else reads as well: code that is not traced, or another tensor in the same memory."""
    model = network.model
    within = {
        module: _islands_of(paths, [one.path for one in network.islands]) for module, paths in network.names.items()
    }
    held, together = owners(model), copied_together([*model.parameters(), *model.buffers()], torch.clone)
    for key, tensor in list(orders.tensors.items()):
        holders = held.get(key, set())
        if key not in names or not holders:
            orders.fix_tensor(tensor, "a tensor that it meets is not in the state dict of the network")
        elif any(len(within[module]) != 1 for module in holders):
            orders.fix_tensor(tensor, f"{names[key][0]} is also reached by code that is not traced")
        elif any(path in network.run.read_directly for module in holders for path in network.names[module]):
            orders.fix_tensor(tensor, f"the network also reads {names[key][0]} directly")
        elif aside := [network.kept_aside[module] for module in holders if module in network.kept_aside]:
            orders.fix_tensor(tensor, f"{names[key][0]} is also kept in {aside[0]}")
        elif key in together:
            orders.fix_tensor(tensor, f"{names[key][0]} lies in the same memory as another tensor")
        elif len(rows := {one.rows for one in orders.axes if one[:2] == (key, 1)}) > 1 and None in rows:
            orders.fix_tensor(tensor, f"{names[key][0]} is the kernel of two convs with other groups")


def _islands_of(paths: Collection[str], islands: Collection[str]) -> set[str | None]:
    """Give the islands that the names of a module lie in; None for a name in none."""
    found: set[str | None] = set()
    for path in paths:
        around = [one for one in islands if not one or f"{path}.".startswith(f"{one}.")]
        found.add(around[0] if around else None)
    return found


def _placed(
    key: Key, orders: Orders, names: Mapping[int, tuple[str, ...]], groups: dict[int, Group]
) -> Iterator[tuple[Group, int, int]]:
    """Note every order on an axis of a tensor in its group."""
    for (order, each), start in starts(orders.axes[key]):
        group = groups.setdefault(id(order), Group(order.size, order.fixed))
        group.places.append(Place(names.get(key.tensor, ()), key.axis, start, each, key.rows))
        yield group, start, each
