"""Channels of a network in another order, exactly: in its tensors, in a state dict, and back again.

    y = W₂ ∗ f(W₁ ∗ x) = W₂[:, π] ∗ f(W₁[π] ∗ x)

for every f that treats channels alone. A plan holds the permutations, each with all places that it has in tensors
(`channels/` finds them), so what it says can be done again without looking at the network.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from surgeon.channels.follow import Group
from surgeon.errors import PlanError
from surgeon.recipes.forms import Form

_Count = Annotated[int, Field(strict=True, ge=0)]
_WHICH = "Give the whole network, or all of its weights, of the plan, without prefixes such as 'module.'."
NO_INPUT = "no example input is known, without which channels cannot be followed through the network"
TAKE_OUT = "Take that entry out of `permuted`: the channels then stay in their order."


class PermutedAxis(Form):
    """Where an order lies in a tensor: on this axis, from `start` on, with `each` numbers in a row for every channel.

    `rows`: in these rows (of the first axis) only.
    """

    tensor: str
    aliases: tuple[str, ...] = ()  # further names of the same tensor
    axis: _Count
    start: _Count = 0
    each: Annotated[int, Field(strict=True, ge=1)] = 1
    rows: tuple[_Count, _Count] | None = None

    def permuted(self, tensor: Tensor, order: Sequence[int]) -> Tensor:
        """Give a tensor in the new order: its channel i is the one that was at `order[i]`."""
        numbers = torch.tensor(order)[:, None] * self.each + torch.arange(self.each) + self.start
        index = torch.arange(tensor.shape[self.axis])
        index[self.start : self.start + numbers.numel()] = numbers.flatten()
        index = index.to(tensor.device)
        if self.rows is None:
            return tensor.index_select(self.axis, index).contiguous(memory_format=_format_of(tensor))
        made = tensor.clone()
        made[slice(*self.rows)] = tensor[slice(*self.rows)].index_select(self.axis, index)
        return made

    def misfit(self, tensor: Tensor | None, size: int) -> str | None:
        """Say why an order of so many channels does not lie there."""
        if tensor is None:
            return f"there is no tensor {self.tensor}"
        if self.axis >= tensor.dim() or self.start + size * self.each > tensor.shape[self.axis]:
            return f"{self.tensor} is {tuple(tensor.shape)}, and has no such channels"
        if self.rows is not None and not self.rows[0] < self.rows[1] <= len(tensor):
            return f"{self.tensor} has {len(tensor)} rows"
        return None


class Permuted(Form):
    """One permutation of channels: channel i becomes the one that was at `order[i]`, in all tensors that have it."""

    order: tuple[_Count, ...]
    tensors: tuple[PermutedAxis, ...]

    @field_validator("order")
    @classmethod
    def _is_a_permutation(cls, order: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"is not a permutation: it has to hold each of 0 to {len(order) - 1} once")
        return order

    @classmethod
    def of(cls, group: Group, order: Sequence[int]) -> Permuted:
        """Write a permutation of an order that channels have in a network."""
        axes = [
            PermutedAxis(
                tensor=one.names[0], aliases=one.names[1:], axis=one.axis, start=one.start, each=one.each, rows=one.rows
            )
            for one in group.places
        ]
        return cls(order=tuple(order), tensors=tuple(sorted(axes, key=_sorted)))

    @property
    def back(self) -> Permuted:
        """The permutation that undoes this one."""
        inverse = sorted(range(len(self.order)), key=lambda place: self.order[place])
        return Permuted(order=tuple(inverse), tensors=self.tensors)

    @property
    def places(self) -> tuple[int, frozenset[PermutedAxis]]:
        """How many channels are permuted, and where."""
        return len(self.order), frozenset(self.tensors)


class OrderKept(Form):
    """A conv whose low channels were to be chosen, and why they are the last ones."""

    path: str
    reason: str


def digest(permuted: Sequence[Permuted]) -> str:
    """Hash permutations, so that weights can say which order their channels have; nothing where there are none."""
    if not permuted:
        return ""
    said = sorted(json.dumps(one.model_dump(mode="json", exclude_defaults=True), sort_keys=True) for one in permuted)
    return hashlib.sha256("\n".join(said).encode(errors="backslashreplace")).hexdigest()[:16]


def permute_(model: nn.Module, permuted: Sequence[Permuted]) -> Callable[[], None]:
    """Permute the channels of a model; its parameters stay the objects they are. Returns a function that undoes this.

    Raises:
        PlanError: a tensor is not there, or has another shape; nothing is done.
    """
    made = _made(dict(_tensors(model)), permuted)
    before = [(tensor, tensor.data, tensor.grad) for tensor, _ in made]
    for tensor, steps in made:
        grad = tensor.grad
        tensor.data = _through(tensor.data, steps)
        if grad is not None:
            tensor.grad = _through(grad, steps)

    def undo() -> None:
        for tensor, data, grad in before:
            tensor.data = data
            tensor.grad = grad

    return undo


def permuted_state(state: Mapping[str, Any], permuted: Sequence[Permuted]) -> OrderedDict[str, Any]:
    """Give a state dict with its channels permuted.

    Raises:
        PlanError: a tensor is not there, under none of its names, or has another shape.
    """
    made = OrderedDict(state)
    for one in permuted:
        for axis in one.tensors:
            held = [name for name in (axis.tensor, *axis.aliases) if name in made]
            _check(axis, made[held[0]] if held else None, len(one.order))
            made |= {name: axis.permuted(made[name], one.order) for name in held}
    vars(made)["_metadata"] = dict(getattr(state, "_metadata", {}))
    return made


_Steps = list[tuple[PermutedAxis, tuple[int, ...]]]


def _made(tensors: Mapping[str, Tensor], permuted: Sequence[Permuted]) -> list[tuple[Tensor, _Steps]]:
    """Collect what is done to each tensor."""
    steps: dict[int, tuple[Tensor, _Steps]] = {}
    for one in permuted:
        for axis in one.tensors:
            _check(axis, tensor := tensors.get(axis.tensor), len(one.order))
            assert tensor is not None
            steps.setdefault(id(tensor), (tensor, []))[1].append((axis, one.order))
    return list(steps.values())


def _through(tensor: Tensor, steps: _Steps) -> Tensor:
    for axis, order in steps:
        tensor = axis.permuted(tensor, order)
    return tensor


def _check(axis: PermutedAxis, tensor: Tensor | None, size: int) -> None:
    if (why := axis.misfit(tensor, size)) is not None:
        raise PlanError(f"channels cannot be permuted: {why}", todo=_WHICH)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _sorted(axis: PermutedAxis) -> tuple[str, int, int, tuple[int, int]]:
    return axis.tensor, axis.axis, axis.start, axis.rows or (0, 0)


def _format_of(tensor: Tensor) -> torch.memory_format:
    is_last = (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return torch.channels_last if is_last else torch.contiguous_format
