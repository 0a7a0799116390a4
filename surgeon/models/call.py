"""What one call of a model is given: an example input. `notation` says how it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import CaptureError
from surgeon.models import devices, notation
from surgeon.models.draw import Draw, Shape


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments for one call of a model, tensors in any nesting of lists, tuples and dicts.

    `is_guess` says that the user did not give them; `written` is the text that they were drawn from; `is_random` says
    that only shapes were given, and numbers drawn.

    >>> inputs = Inputs((torch.zeros(1, 3, 8, 8),), {"mask": torch.ones(1, 8, 8, dtype=torch.bool)})
    >>> str(inputs)
    '1×3×8×8; mask=1×8×8:bool'
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_guess: bool = False
    written: str = ""
    is_random: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self._leaves() if isinstance(leaf, Tensor))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def has_tensors(self) -> bool:
        """Whether there are tensors, or any still to be drawn."""
        return any(isinstance(leaf, Tensor | Draw) for leaf in self._leaves())

    @property
    def numel(self) -> int:
        """How many numbers there are in all of its tensors."""
        return sum(math.prod(leaf.shape) for leaf in self._leaves() if isinstance(leaf, Tensor | Draw))

    @property
    def text(self) -> str:
        """How the call is written; a value without a notation is written as its Python repr."""
        return self.written or notation.write(self.args, self.kwargs)

    @property
    def record(self) -> tuple[Shape, ...] | str | None:
        """What a plan keeps: shapes where all are positional floats, else text; None where that would not read back."""
        if not self.kwargs and all(isinstance(one, Tensor) and one.is_floating_point() for one in self.args):
            return self.shapes
        try:
            again = parse(self.text)
        except CaptureError:
            return None
        pairs = zip(self._leaves(), again._leaves(), strict=False)
        is_same = self._structure() == again._structure() and all(_stands_for(one, other) for one, other in pairs)
        return self.text if is_same else None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def on_meta(self) -> Inputs:
        """Keep shapes and dtypes without numbers, also of tensors that are still to be drawn."""

        def emptied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to("meta")
            return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Draw) else value

        args, kwargs = pytree.tree_map(emptied, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Copy the tensors, since a model may write on them, with the floating point ones in `dtype`."""
        return self.map(lambda t: t.detach().to(dtype if t.is_floating_point() else t.dtype, copy=True))

    def cast_for(self, model: nn.Module, dtype: torch.dtype | None = None) -> Inputs:
        """Copy them to the device of the model, in `dtype` or that of its first floating point parameter.

        A model on several devices moves its inputs by itself. Meta tensors stay as they are.
        """
        copied = self.cast(dtype or devices.dtype_of(model))
        device = devices.of(model)
        return copied if device is None else copied.map(lambda t: t if t.is_meta else t.to(device))

    @property
    def batch(self) -> int:
        """How many images, or whatever it is, the first tensor or list of images holds; 1 where that is not known."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)), is_leaf=_is_batch)
        return next((len(part) for part in leaves if _has_batch(part)), 1)

    def batched(self, count: int) -> Inputs:
        """Repeat or cut to `count` all tensors, and lists of images, whose batch is as large as the first one's."""
        return self._rows([i % max(self.batch, 1) for i in range(count)])

    def part(self, start: int, stop: int) -> Inputs:
        """Cut out some images of the batch, as `batched` does.

        >>> Inputs((torch.zeros(5, 3, 8, 8), torch.zeros(2))).part(3, 9).shapes
        ((2, 3, 8, 8), (2,))
        """
        return self._rows(range(start, min(stop, self.batch)))

    def _rows(self, rows: Sequence[int]) -> Inputs:
        given = (self.args, dict(self.kwargs))
        parts = [part for part in pytree.tree_leaves(given, is_leaf=_is_batch) if _has_batch(part)]

        def cut(part: Any) -> Any:
            if not _has_batch(part) or len(part) != len(parts[0]):
                return part
            if not isinstance(part, Tensor):
                return [part[row] for row in rows]
            is_run = len(rows) > 0 and list(rows) == list(range(rows[0], rows[0] + len(rows)))
            return part[rows[0] : rows[0] + len(rows)] if is_run else part[list(rows)]

        return Inputs(*pytree.tree_map(cut, given, is_leaf=_is_batch))

    def alike(self, count: int, seed: int) -> list[Inputs]:
        """Draw more inputs with the same shapes, means and spreads; none if there is nothing to draw."""
        if not any(t.is_floating_point() and t.numel() for t in self.tensors):
            return []
        generator = torch.Generator().manual_seed(seed + 1)
        return [self.map(lambda t: _random_like(t, generator)) for _ in range(count)]

    def call(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **self.kwargs)

    def drawn(self, seed: int) -> Inputs:
        """Draw the tensors that are still to be drawn."""
        generator = torch.Generator().manual_seed(seed)
        is_random = self.is_random or (self.has_tensors and not self.tensors)
        args, kwargs = pytree.tree_map_only(Draw, lambda draw: draw.tensor(generator), (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, written=self.text, is_random=is_random)

    def __str__(self) -> str:
        return self.text.replace(",", "×").replace(";", "; ")

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    def _structure(self) -> pytree.TreeSpec:
        return pytree.tree_structure((self.args, dict(self.kwargs)))


def call_of(inputs: Inputs | Sequence[Tensor]) -> Inputs:
    """Turn plain tensors into positional arguments."""
    return inputs if isinstance(inputs, Inputs) else Inputs(tuple(inputs))


def parse(text: str, leaf: Callable[[str], Any] | None = None) -> Inputs:
    """Read a call as it is written; `leaf` reads the values, shapes if it is not given.

    >>> str(parse("1,3,8,8;mask=1x8x8:bool").drawn(0))
    '1×3×8×8; mask=1×8×8:bool'

    Raises:
        CaptureError: what cannot be read.
    """
    return Inputs(*notation.read(text, leaf))


def recall(record: Sequence[Shape] | str | None) -> Inputs | None:
    """Read what `Inputs.record` gave; the tensors are still to be drawn.

    Raises:
        CaptureError: it is not such a record. Only shapes are read, since the record may come from a file.
    """
    if record is None or isinstance(record, str):
        return None if record is None else parse(record)
    if any(side < 0 for shape in record for side in shape):
        raise CaptureError(f"{record} are not shapes", todo=notation.HOW_TO_WRITE)
    return Inputs(tuple(Draw(tuple(shape)) for shape in record))


def _stands_for(leaf: Any, drawn: Any) -> bool:
    """Whether what was read back can be drawn in place of a tensor, or is the same constant."""
    if isinstance(leaf, Tensor | Draw) and isinstance(drawn, Draw):
        return tuple(leaf.shape) == drawn.shape
    return leaf is drawn


def _is_batch(value: Any) -> bool:
    """Whether a list is itself the batch: a detector's images, or the targets beside them."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(one, dict) or (isinstance(one, Tensor) and one.dim() == 3) for one in value)


def _has_batch(part: Any) -> bool:
    return (isinstance(part, Tensor) and part.dim() > 0 and len(part) > 0) or _is_batch(part)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    spread, mean = tensor.double().std(correction=0).item(), tensor.double().mean().item()
    return (Draw(tuple(tensor.shape)).tensor(generator) * (spread or 1.0) + mean).to(tensor)
