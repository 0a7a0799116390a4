"""A file that holds a program, as a module: it takes what the network takes that it was made from.

Its parameters are the numbers that the file stores. A copy with other numbers computes with these, and one with float64
numbers computes in float64, so that a file can be judged like any other model. It has no modules of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import CaptureError
from surgeon.files.exports.base import Program

_PREFIX = "number_"  # of the names that parameters have here: those in the file may be no names for torch


class Compiled(nn.Module):
    """The program in a file, with its numbers as parameters."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self._like: Any = None
        for i, tensor in enumerate(program.tensors.values()):
            self.register_parameter(f"{_PREFIX}{i}", nn.Parameter(tensor, requires_grad=False))

    @property
    def stored(self) -> dict[str, Tensor]:
        """The numbers that this copy computes with, by their names in the file."""
        return {name: self._parameters[f"{_PREFIX}{i}"].detach() for i, name in enumerate(self.program.tensors)}  # type: ignore[union-attr]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if why := self.refusal(args, kwargs):
            raise CaptureError(why, todo="Give an input that the file takes.")
        made = self.program.run(self.stored, args, kwargs)
        if given := flat(self.program, args, kwargs):
            made = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(given[0].device), made)
        return made if self._like is None else _in_place_of(self._like, made)

    def refusal(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Say why the file does not take these arguments; None if it does."""
        given = flat(self.program, args, kwargs)
        takes = f"the file takes {'; '.join(map(str, self.program.inputs))}"
        if len(given) != len(self.program.inputs):
            return f"{takes}, and {len(given)} tensors are given"
        for port, tensor in zip(self.program.inputs, given, strict=True):
            if not port.takes(tensor):
                return f"{takes}, and {port.name} is {'×'.join(map(str, tensor.shape))}"
        return None

    def answering_like(self, out: Any) -> Self:
        """Give results in the structure of another model's: a file may hold no more than a list of tensors."""
        self._like = pytree.tree_map_only(Tensor, lambda _: _Hole(), opened(out))
        return self

    def train(self, mode: bool = True) -> Self:
        """Note the mode. A program was made in eval mode, and stays as it is."""
        self.training = mode
        return self


def is_record(value: Any) -> bool:
    """Whether something is a dataclass's object, and torch does not look into it."""
    is_class = isinstance(value, type)
    return dataclasses.is_dataclass(value) and not is_class and pytree.tree_leaves(value) == [value]


def opened(out: Any) -> Any:
    """Turn records that torch does not look into into dicts."""

    def fields(record: Any) -> Any:
        if not is_record(record):
            return record
        return {one.name: opened(getattr(record, one.name)) for one in dataclasses.fields(record)}

    return pytree.tree_map(fields, out, is_leaf=is_record)


class _Hole:
    """Where a tensor belongs in a result."""


def flat(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Give all tensors in a call, in the order in which the program takes them; arguments with names go by name."""
    names = [port.name for port in program.inputs]
    ordered = sorted(kwargs, key=lambda name: names.index(name) if name in names else len(names))
    leaves = pytree.tree_leaves((args, [kwargs[name] for name in ordered]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _in_place_of(like: Any, made: Any) -> Any:
    """Put tensors in the places that another model's result has for them."""
    given = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
    leaves, tree = pytree.tree_flatten(like)
    if sum(isinstance(leaf, _Hole) for leaf in leaves) != len(given):
        return made  # the difference is for whoever compares them
    rest = iter(given)
    return pytree.tree_unflatten([next(rest) if isinstance(leaf, _Hole) else leaf for leaf in leaves], tree)


def dtypes_of(tensors: Mapping[str, Tensor]) -> set[torch.dtype]:
    """Say in which dtypes the floating point numbers are."""
    return {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
