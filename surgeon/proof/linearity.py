"""Is what a module computes of its input affine, and how far does it look? Every step of a run is watched.

    f(x) = f(0) + L·x

A step that is given something of the input has to be one of those below: a convolution, a batch norm of fixed
statistics, a sum, a product with a constant, padding, a window's mean, channels and pixels in another order. Whatever
else happens to the input, a comparison for example, is no such step, and then nothing is said. So it is the steps that
show that f is affine, and not the numbers that come out.

Noted beside it, for each axis, in pixels of the input: `jump`, between two neighbours in the output; and `reach`, from
the first to the last pixel that one of the output sees. `groups` is how many blocks of channels do not see each other.

A convolution of an input in which every image has a single channel that is not zero is done with the taps of that
channel alone: what is left out are sums of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon._torch_compat import TorchDispatchMode

_REORDERS = ("index_select", "native_channel_shuffle", "channel_shuffle", "cat", "view", "_unsafe_view", "reshape")
_FIRST = frozenset(  # what they do to their first argument is affine if the others are constant
    {
        *("convolution", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
        *(
            "miopen_batch_norm",
            "constant_pad_nd",
            "reflection_pad2d",
            "replication_pad2d",
            "avg_pool2d",
            "neg",
            "clone",
        ),
        *("slice", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "alias", "detach", "split", "div"),
        *("split_with_sizes", "contiguous", "_to_copy", "div_", "neg_", *_REORDERS),
    }
)
_SUMS = frozenset({"add", "sub", "add_", "sub_"})
_PRODUCTS = {"mul": (0, 1), "mul_": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}
_FRESH = frozenset(
    {"ones_like", "full_like", "empty_like", "new_empty", "new_zeros", "zeros_like", "new_empty_strided"}
)
_COPIES = frozenset({"copy_"})
_TRAINING = {"native_batch_norm": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5}


class NotLinearError(Exception):
    """A step of the run is none that is known to be affine and the same at every pixel; its text names the step."""


@dataclass(frozen=True, slots=True)
class Trace:
    """How something in a run depends on the input; see the top of this file. No `groups` yet: each channel by itself.

    `slack` are further rows and columns of the input that it takes until no border has anything to do with the other.
    """

    jump: tuple[int, int] = (1, 1)
    reach: tuple[int, int] = (0, 0)
    slack: tuple[int, int] = (0, 0)
    groups: int = 0

    def merged(self, other: Trace) -> Trace:
        """Give the trace of a step that reads both."""
        if self.jump != other.jump:
            raise NotLinearError("maps of different strides are put together")
        reach, slack = (_largest(one, two) for one, two in ((self.reach, other.reach), (self.slack, other.slack)))
        return Trace(self.jump, reach, slack, math.gcd(self.groups, other.groups))

    def windowed(self, window: Sequence[int], stride: Sequence[int]) -> Trace:
        """Give the trace behind a window that moves by `stride`; `window` is from its first to its last pixel."""
        reach = tuple(r + j * w for r, j, w in zip(self.reach, self.jump, window, strict=True))
        jump = tuple(j * s for j, s in zip(self.jump, stride, strict=True))
        return Trace(_pair(jump), _pair(reach), self.slack, self.groups)

    def loosened(self, rows: int, columns: int) -> Trace:
        """Give the trace behind a step that crops or mirrors so many rows and columns."""
        more = (self.slack[0] + rows * self.jump[0], self.slack[1] + columns * self.jump[1])
        return Trace(self.jump, self.reach, more, self.groups)

    def grouped(self, groups: int) -> Trace:
        return Trace(self.jump, self.reach, self.slack, math.gcd(self.groups, groups))


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every step is watched that is given something of `x`.

    `lone` is how many images of `x` in a row have the same single channel that is not zero, if they have.
    """

    def __init__(self, x: Tensor, *, lone: int = 0, wraps: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lone, self.wraps = lone, wraps
        self._traces: dict[int, Trace] = {}
        self._held: list[Tensor] = []  # so that no memory is used for something else meanwhile
        self._note(x, Trace())

    def trace(self, x: Any) -> Trace:
        """Say how a result depends on the input.

        Raises:
            NotLinearError: it does not, as far as was seen.
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or _key(x) not in self._traces:
            raise NotLinearError("what comes out is no map that was made of the input")
        return self._traces[_key(x)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moving = [t for t in _tensors((args, kwargs)) if _key(t) in self._traces]
        if not moving:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _FRESH:
            return func(*args, **kwargs)
        if not self._is_affine(name, args, moving):
            raise NotLinearError(f"{name} is no step that is known to be affine")
        trace = self._traces[_key(moving[0])]
        for other in moving[1:]:
            trace = trace.merged(self._traces[_key(other)])
        out = self._lone_convolution(args) if name == "convolution" else None
        out = func(*args, **kwargs) if out is None else out
        trace = self._behind(name, args, out, trace)
        for made in _tensors(out):
            if made.numel():
                if made.dtype != torch.float64:
                    raise NotLinearError(f"{name} rounds to {made.dtype}")
                self._note(made, trace)
        return out

    def _note(self, x: Tensor, trace: Trace) -> None:
        self._held.append(x)
        known = self._traces.get(_key(x))
        self._traces[_key(x)] = trace if known is None else known.merged(trace) if known.jump == trace.jump else trace

    def _moves(self, value: Any) -> bool:
        return any(_key(t) in self._traces for t in _tensors(value))

    def _is_affine(self, name: str, args: Any, moving: Sequence[Tensor]) -> bool:
        """Whether a step is affine in that of its arguments which depend on the input."""
        count = sum(self._moves(value) for value in args)
        if name in _SUMS:
            return True
        if name in _COPIES:
            return not self._moves(args[2:])
        if name == "where":
            return not self._moves(args[0])
        if name in _PRODUCTS:
            one, other = (self._moves(args[i]) for i in _PRODUCTS[name])
            return not (one and other)
        if name in _TRAINING and args[_TRAINING[name]]:
            return False
        if name == "convolution" and (args[6] or args[1].dim() != 4):
            return False
        return name in _FIRST and count == 1 and self._moves(args[0])

    def _behind(self, name: str, args: Any, out: Any, trace: Trace) -> Trace:
        """Give the trace of what a step makes."""
        if name == "convolution":
            window = [d * (k - 1) for d, k in zip(args[5], args[1].shape[2:], strict=True)]
            return trace.windowed(window, args[3]).grouped(args[8])
        if name == "avg_pool2d":
            kernel = _both(args[1])
            return trace.windowed([k - 1 for k in kernel], _both(args[2]) if len(args) > 2 and args[2] else kernel)
        if name == "constant_pad_nd":
            left, right, top, bottom = (*args[1], 0, 0)[:4]
            return trace.loosened(-min(top, 0) - min(bottom, 0), -min(left, 0) - min(right, 0))
        if name in ("reflection_pad2d", "replication_pad2d"):
            left, right, top, bottom = map(abs, args[1])
            return trace.loosened(2 * max(top, bottom), 2 * max(left, right))
        if name == "slice":
            if (step := args[4] if len(args) > 4 else 1) != 1:
                raise NotLinearError(f"only every {step}th is taken")
            whole, dim = args[0].shape, args[1] % args[0].dim()
            lost = whole[dim] - out.shape[dim]
            if dim >= 2 and not self.wraps:
                return trace.loosened(lost * (dim == 2), lost * (dim == 3))
            return trace.grouped(1) if dim == 1 else trace
        if name in (*_REORDERS, "split", "split_with_sizes", "mm", "bmm", "addmm", "addmm_"):
            return trace.grouped(1)
        return trace

    def _lone_convolution(self, args: Any) -> Tensor | None:
        """Convolve images of one channel each with the taps of that channel; None where that is not what is given."""
        x, weight, bias, stride, padding, dilation, _, _, groups = args
        if not self.lone or groups != 1 or len(x) % self.lone or x.shape[1] == 1:
            return None
        seen = x.ne(0).flatten(2).any(2).view(-1, self.lone, x.shape[1]).any(1)  # (channels at hand, in)
        if seen.sum(1).max() > 1:
            return None
        channel = seen.int().argmax(1)
        rows = torch.arange(len(x), device=x.device)
        single = x[rows, channel.repeat_interleave(self.lone)][:, None]
        columns = F.unfold(single, tuple(weight.shape[2:]), dilation, padding, stride)  # (n, taps, pixels)
        size = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
        ]
        taps = weight.flatten(2).permute(1, 2, 0)[channel]  # (channels at hand, taps, out)
        each = columns.view(len(channel), self.lone, *columns.shape[1:]).transpose(2, 3).flatten(1, 2)
        made = torch.bmm(each, taps) if bias is None else torch.baddbmm(bias.view(1, 1, -1), each, taps)
        return made.view(len(x), *size, -1).permute(0, 3, 1, 2)


def steps_of(run: Callable[[Tensor], Any], x: Tensor, *, lone: int = 0, wraps: bool = False) -> tuple[Tensor, Trace]:
    """Run something on an input, and say how the result depends on it.

    Raises:
        NotLinearError: a step is not known to be affine.
    """
    with torch.no_grad(), Watched(x, lone=lone, wraps=wraps) as watched:
        out = run(x)
    trace = watched.trace(out)
    assert isinstance(out, Tensor)
    return out, trace


def _tensors(value: Any) -> Iterator[Tensor]:
    """Give the tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _both(value: Any) -> tuple[int, int]:
    return _pair(value) if isinstance(value, list | tuple) and len(value) == 2 else _pair([*_listed(value)] * 2)


def _listed(value: Any) -> Sequence[int]:
    return value if isinstance(value, list | tuple) else [value]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _largest(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])
