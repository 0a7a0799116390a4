"""What one call of a model is given, and how `--input` and plans write it.

    call  = part; part; …           positional arguments, then named ones
    part  = value or name=value
    value = 1,3,224,224             a tensor of that shape, float noise; 1x3x224x224 is the same, () a single number
            1,10:int64              of that dtype; whole numbers are drawn from 0 … 9
            1,10:int64<1000         … or from 0 … 999
            [3,300,300;3,280,320]   a list of values
            (1,8;1,8)               a tuple of values
            {a=1,3,8,8;b=1,3,8,8}   a dict of values
            true, false, none       themselves

A plan keeps its example so that it can be drawn again; it never names a file or a function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import CaptureError
from surgeon.models import devices

Shape = tuple[int, ...]

_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_WHOLES = ("uint8", "int8", "int16", "int32", "int64")
_DTYPES = {name: getattr(torch, name) for name in (*_FLOATS, *_WHOLES, "bool")}
_DEEPEST = 20  # brackets within each other
_DRAWN_BELOW = 10  # whole numbers, unless a bound is given
_CONSTANTS = {"true": True, "false": False, "none": None}
_NAMED = re.compile(r"\s*([^\W\d]\w*)\s*=(.*)", re.DOTALL)
_TODO = "Write batch, channels, height, width: --input 1,3,224,224."


@dataclass(frozen=True, slots=True)
class Draw:
    """A tensor that is still to be drawn, on the CPU: normal noise, or whole numbers from 0 to below `bound`."""

    shape: Shape
    dtype: torch.dtype = torch.float64
    bound: int | None = None

    @classmethod
    def like(cls, tensor: Tensor) -> Self:
        """Describe a tensor, so that what is drawn could stand in for it."""
        is_index = _name(tensor.dtype) in _WHOLES and tensor.numel() and not tensor.is_meta
        return cls(tuple(tensor.shape), tensor.dtype, max(1, int(tensor.max()) + 1) if is_index else None)

    def tensor(self, generator: torch.Generator) -> Tensor:
        try:
            if self.dtype.is_complex:
                return torch.randn(self.shape, generator=generator, dtype=torch.complex128, device="cpu").to(self.dtype)
            if self.dtype.is_floating_point:
                return torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
            below = 2 if self.dtype == torch.bool else self.bound or _DRAWN_BELOW
            return torch.randint(below, self.shape, generator=generator, device="cpu").to(self.dtype)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # a TypeError is beyond 64 bits
            sides = "×".join(map(str, self.shape))
            raise CaptureError(f"an input of {sides} does not fit into memory", todo="Give a smaller shape.") from error

    def __str__(self) -> str:
        sides = ",".join(map(str, self.shape)) or "()"
        dtype = "" if self.dtype.is_floating_point else f":{_name(self.dtype)}"
        return sides + dtype + (f"<{self.bound}" if self.bound is not None else "")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments for one call of a model, tensors in any nesting of lists, tuples and dicts.

    `is_guess` when nobody gave them; `written` is how they were asked for, where they were drawn.

    >>> inputs = Inputs((torch.zeros(1, 3, 8, 8),), {"mask": torch.ones(1, 8, 8, dtype=torch.bool)})
    >>> str(inputs)
    '1×3×8×8; mask=1×8×8:bool'
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_guess: bool = False
    written: str = ""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self._leaves() if isinstance(leaf, Tensor))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def has_tensors(self) -> bool:
        """Whether there are any, or any to be drawn."""
        return any(isinstance(leaf, Tensor | Draw) for leaf in self._leaves())

    @property
    def numel(self) -> int:
        """How many numbers there are in all of its tensors."""
        return sum(math.prod(leaf.shape) for leaf in self._leaves() if isinstance(leaf, Tensor | Draw))

    @property
    def text(self) -> str:
        """How the call is written; what has no notation stands there as Python shows it."""
        named = (f"{name}={_write(value)}" for name, value in self.kwargs.items())
        return self.written or ";".join([*map(_write, self.args), *named])

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
        """Keep shapes and dtypes, and no numbers, also of what is still to be drawn."""

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
        """Copy them to where the model lies, in `dtype` or that of its first floating point parameter.

        Where a model lies on several devices, it moves what it is given by itself. Tensors without numbers stay so.
        """
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        copied = self.cast(dtype or next(dtypes, torch.get_default_dtype()))
        device = devices.of(model)
        return copied if device is None else copied.map(lambda t: t if t.is_meta else t.to(device))

    def batched(self, count: int) -> Inputs:
        """Repeat or cut every tensor that has the first one's batch to a batch of `count`; so with lists of images."""
        given = (self.args, dict(self.kwargs))
        parts = [part for part in pytree.tree_leaves(given, is_leaf=_is_batch) if _has_batch(part)]

        def cut(part: Any) -> Any:
            if not _has_batch(part) or len(part) != len(parts[0]):
                return part
            rows = [i % len(part) for i in range(count)]
            return part[rows] if isinstance(part, Tensor) else [part[row] for row in rows]

        return Inputs(*pytree.tree_map(cut, given, is_leaf=_is_batch))

    def alike(self, count: int, seed: int) -> list[Inputs]:
        """Draw more inputs of this kind: noise of the same shape, mean and spread; none if there is nothing to draw."""
        if not any(t.is_floating_point() and t.numel() for t in self.tensors):
            return []
        generator = torch.Generator().manual_seed(seed + 1)
        return [self.map(lambda t: _noise_like(t, generator)) for _ in range(count)]

    def call(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **self.kwargs)

    def drawn(self, seed: int) -> Inputs:
        """Draw the tensors that are still to be drawn."""
        generator = torch.Generator().manual_seed(seed)
        args, kwargs = pytree.tree_map_only(Draw, lambda draw: draw.tensor(generator), (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, written=self.text)

    def __str__(self) -> str:
        return self.text.replace(",", "×").replace(";", "; ")

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    def _structure(self) -> pytree.TreeSpec:
        return pytree.tree_structure((self.args, dict(self.kwargs)))


def call_of(inputs: Inputs | Sequence[Tensor]) -> Inputs:
    """Take tensors alone as positional arguments."""
    return inputs if isinstance(inputs, Inputs) else Inputs(tuple(inputs))


def parse(text: str, leaf: Callable[[str], Any] | None = None) -> Inputs:
    """Read a call as it is written; `leaf` reads the values, shapes if it is not given.

    >>> parse("1,3,8,8;mask=1x8x8:bool").kwargs
    {'mask': Draw(shape=(1, 8, 8), dtype=torch.bool, bound=None)}

    Raises:
        CaptureError: what cannot be read.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for part in _split(text):
        if named := _NAMED.fullmatch(part):
            _add_(kwargs, named, leaf or draw)
        elif kwargs:
            raise CaptureError(f"{part!r} has no name, and follows one that has", todo="Put names last: a;b;mask=c.")
        else:
            args.append(_value(part, leaf or draw))
    return Inputs(tuple(args), kwargs)


def recall(record: Sequence[Shape] | str | None) -> Inputs | None:
    """Read what `Inputs.record` gave; the tensors are still to be drawn.

    Raises:
        CaptureError: it is no such record; nothing but shapes is read, for it may have come with a file.
    """
    if record is None or isinstance(record, str):
        return None if record is None else parse(record)
    if any(side < 0 for shape in record for side in shape):
        raise CaptureError(f"{record} are not shapes", todo=_TODO)
    return Inputs(tuple(Draw(tuple(shape)) for shape in record))


def draw(text: str) -> Draw:
    """Read a shape, perhaps with a dtype.

    >>> draw("2,10:int64<1000")
    Draw(shape=(2, 10), dtype=torch.int64, bound=1000)
    """
    sides, has_dtype, dtype = text.partition(":")
    sides = sides.strip().removeprefix("(").removesuffix(")").strip()
    try:
        shape = tuple(int(part) for part in re.split("[,x×]", sides.lower())) if sides else ()
    except ValueError:
        shape = (0,)
    if min(shape, default=1) < 1 or not (sides or "(" in text):
        raise CaptureError(f"{text!r} is not a shape", todo=_TODO)
    return Draw(shape, *_kind(dtype, text)) if has_dtype else Draw(shape)


def _kind(dtype: str, text: str) -> tuple[torch.dtype, int | None]:
    """Read what stands behind the colon: int64, int64<1000."""
    name, has_bound, bound = (part.strip() for part in dtype.partition("<"))
    if name not in _DTYPES:
        raise CaptureError(f"{text!r} names no dtype that can be drawn", todo=f"There are {', '.join(_DTYPES)}.")
    if not has_bound:
        return _DTYPES[name], None
    most = torch.iinfo(_DTYPES[name]).max + 1 if name in _WHOLES else 0
    if not re.fullmatch("[0-9]{1,19}", bound) or not 1 <= int(bound) <= most:
        what = f"a bound from 1 to {most}" if most else "no bound, it is for whole numbers only"
        raise CaptureError(f"{text!r} cannot be drawn: {name} takes {what}", todo="Write --input 1,10:int64<1000.")
    return _DTYPES[name], int(bound)


def _split(text: str) -> list[str]:
    """Cut at the semicolons that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == ";" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
        if not 0 <= depth <= _DEEPEST:
            break
    if depth:
        why = "do not match" if depth <= _DEEPEST else "are too deep"
        raise CaptureError(f"the brackets of {text!r} {why}", todo="Write a list as [3,300,300;3,280,320].")
    return parts


def _value(text: str, leaf: Callable[[str], Any]) -> Any:
    text = text.strip()
    inner = text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        return [_value(part, leaf) for part in _split(inner)]
    if text.startswith("(") and text.endswith(")") and ";" in inner:
        return tuple(_value(part, leaf) for part in _split(inner.rstrip().removesuffix(";")))
    if text.startswith("{") and text.endswith("}"):
        return _dict(inner, leaf)
    return _CONSTANTS[text] if text in _CONSTANTS else leaf(text)


def _dict(text: str, leaf: Callable[[str], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _split(text):
        named = _NAMED.fullmatch(part)
        if named is None:
            raise CaptureError(f"{part!r} has no name", todo="Write a dict as {image=1,3,8,8;mask=1,1,8,8}.")
        _add_(found, named, leaf)
    return found


def _add_(found: dict[str, Any], named: re.Match[str], leaf: Callable[[str], Any]) -> None:
    name, value = named.groups()
    if name in found:
        raise CaptureError(f"{name!r} is given twice", todo="Give every argument once.")
    found[name] = _value(value, leaf)


def _write(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(Draw.like(value))
    if isinstance(value, dict):
        return "{" + ";".join(f"{key}={_write(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ";".join(map(_write, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_write(part)};" for part in value) + ")"
    return str(value) if isinstance(value, Draw) else next(_constants(value), repr(value))


def _constants(value: Any) -> Iterator[str]:
    return (word for word, constant in _CONSTANTS.items() if value is constant)


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


def _noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    spread, mean = tensor.double().std(correction=0).item(), tensor.double().mean().item()
    return (Draw(tuple(tensor.shape)).tensor(generator) * (spread or 1.0) + mean).to(tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
