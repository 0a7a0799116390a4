"""What a conv computes, if its class is a subclass of Conv2d: read by watching it, not by its name.

Some classes add nothing but attributes; others pad their input first, by fixed amounts or as SAME of TensorFlow does.
The conv is called on maps without numbers, of several sizes, in both modes, and every operation that this comes down
to is seen: zeros put around the map and one convolution with the own tensors of the conv, and nothing else, or it is
not such a conv. So no list of packages is needed, and a version of one that computes something else is not mistaken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgeon._torch_compat import TorchDispatchMode, own_parts_of_a_conv
from surgeon.conv import padding
from surgeon.conv.padding import Sides
from surgeon.conv.spec import ConvSpec
from surgeon.models.sandbox import quietly

_GRADIENTS = frozenset({"ConvolutionBackward0", "ConstantPadNdBackward0", "AccumulateGrad", "NoneType"})
_FIXED = "only convs whose weights are the same at every call are swapped"


_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # stride, dilation, groups


class _OtherError(Exception):
    """What a conv does that is neither padding with zeros nor one convolution with its own tensors."""


def read(conv: nn.Conv2d) -> ConvSpec | str:
    """Say what a conv computes, or, in words that follow "it", why it is no conv that a block can replace.

    >>> class Mine(nn.Conv2d):
    ...     def forward(self, input):
    ...         return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))
    >>> read(Mine(3, 8, 3, stride=2))
    ConvSpec(3→8, 3x3, stride=2, padding=0/1)
    """
    spec = ConvSpec.of(conv)
    if type(conv) in (nn.Conv2d, padding.PaddedConv2d):
        return spec
    own = own_parts_of_a_conv(type(conv))
    try:
        found = _watched(conv, spec) if own else spec
    except _OtherError as error:
        return str(error)
    tensors = (*conv.named_parameters(), *conv.named_buffers())
    if held := [name for name, _ in tensors if name not in ("weight", "bias")]:
        return f"it also holds {held[0]}, which a block would not have"
    if stored := [name for name in own if "state_dict" in name]:
        return f"it stores its tensors in a way of its own ({stored[0]})"
    return found


def again(origin: nn.Conv2d | None, conv: nn.Conv2d) -> nn.Conv2d:
    """Give a conv the class and the attributes of the one that a block has replaced, if it then computes the same.

    >>> class Mine(nn.Conv2d): ...
    >>> type(again(shell(Mine(3, 8, 3)), nn.Conv2d(3, 8, 3, bias=False))).__name__
    'Mine'
    """
    if not isinstance(origin, nn.Conv2d):
        return conv
    try:
        made = _twin(origin, {"weight": conv.weight, "bias": conv.bias})
        made.train(conv.training)
        found = read(made)
    except Exception:  # it may have come with a file
        return conv
    return made if found == ConvSpec.of(conv) else conv


def shell(conv: nn.Conv2d) -> nn.Conv2d:
    """Copy the class and the attributes of a conv without its tensors."""
    return _twin(conv, {"weight": None, "bias": None})


def _twin(conv: nn.Conv2d, parameters: dict[str, Any]) -> nn.Conv2d:
    made = type(conv).__new__(type(conv))
    vars(made).update(vars(conv))
    for name, held in vars(conv).items():
        if type(held) in (dict, list, set):  # what a call may change stays the original's own
            vars(made)[name] = type(held)(held)
    vars(made)["_parameters"] = dict(parameters)
    return made


class _Seen(NamedTuple):
    """How much a conv has padded one map, and how it has convolved it then."""

    size: tuple[int, int]
    pads: Sides
    geometry: _Geometry | None


def _watched(conv: nn.Conv2d, spec: ConvSpec) -> ConvSpec:
    """Call a conv on maps of several sizes, and find the rule by which it pads them."""
    seen = [_called(conv, size, training) for training in (False, True) for size in _sizes(spec)]
    first = seen[0]
    if any(one.geometry != (spec.stride, spec.dilation, spec.groups) for one in seen):
        raise _OtherError("it convolves with another stride or dilation than its own")
    plain = spec.change(padding=(0, 0), padding_mode="zeros", pads_input=None)
    if all(one.pads == first.pads for one in seen):
        top, bottom, left, right = first.pads
        if (top, left) == (bottom, right):
            return plain.change(padding=(top, left))
        return plain.change(pads_input=first.pads)
    if all(one.pads == _same(plain, one.size) for one in seen):
        return plain.change(pads_input="same")
    raise _OtherError("it pads its input by a rule that surgeon does not know")


def _same(spec: ConvSpec, size: tuple[int, int]) -> Sides:
    axes = zip(size, spec.kernel, spec.stride, spec.dilation, strict=True)
    (top, bottom), (left, right) = (padding.same(*axis) for axis in axes)
    return top, bottom, left, right


def _sizes(spec: ConvSpec) -> Iterator[tuple[int, int]]:
    """Give sizes with every remainder that the strides leave, the axes never alike; small ones and large ones."""
    eh, ew = (dilation * (kernel - 1) + 1 for kernel, dilation in zip(spec.kernel, spec.dilation, strict=True))
    period = min(math.lcm(*spec.stride), 8)
    for rest in range(period + 1):
        yield eh + rest, ew + rest + 1
    yield from ((eh + 50, ew + 223), (eh + 224, ew + 67))


def _called(conv: nn.Conv2d, size: tuple[int, int], training: bool) -> _Seen:
    """Watch one call of a fresh copy."""
    held = {name: None if one is None else nn.Parameter(one.to("meta")) for name, one in conv._parameters.items()}
    twin = _twin(conv, held)
    twin._buffers.update({name: None if one is None else one.to("meta") for name, one in conv._buffers.items()})
    twin.training = training
    x = torch.empty(2, conv.in_channels, *size, dtype=conv.weight.dtype, device="meta", requires_grad=True)
    before = _state(twin)
    watch = _Watch(x, twin)
    try:
        with quietly(), torch.enable_grad(), watch:
            made: Any = twin(x)
    except _OtherError:
        raise
    except Exception as error:
        raise _OtherError(f"it does not run without numbers ({type(error).__name__})") from error
    if _state(twin) != before:
        raise _OtherError("it remembers something of the inputs that it was called with")
    if made is not watch.result or not isinstance(made, Tensor):
        raise _OtherError("it returns something else than the result of its convolution")
    if not {type(one).__name__ for one in _gradients(made)} <= _GRADIENTS or made.grad_fn is None:
        raise _OtherError("it computes gradients in a way of its own")
    return _Seen(size, watch.pads, watch.convolved)


def _state(conv: nn.Conv2d) -> list[tuple[str, str, int]]:
    """What a call that leaves no trace does not change."""
    named = itertools.chain(vars(conv).items(), conv._modules.items(), conv._buffers.items())
    return [
        (name, repr(value) if not isinstance(value, Tensor | nn.Module) else "", id(value)) for name, value in named
    ]


def _gradients(made: Tensor) -> Iterator[Any]:
    waiting: list[Any] = [made.grad_fn]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += [before for before, _ in getattr(one, "next_functions", ())]


class _Watch(TorchDispatchMode):
    """Sees every operation of a call; any but padding with zeros and the one convolution is an error."""

    def __init__(self, x: Tensor, conv: nn.Conv2d) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.map: Tensor = x  # the input, or what has been made of it so far
        self.pads: Sides = (0, 0, 0, 0)
        self.conv = conv
        self.convolved: _Geometry | None = None
        self.result: Tensor | None = None
        self.autocast = torch.is_autocast_enabled("cuda")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cuda") != self.autocast or not torch.is_grad_enabled():
            raise _OtherError("it switches gradients or autocast off or on")
        if self.result is not None:
            raise _OtherError("it does something to the result of its convolution")
        if func is torch.ops.aten.constant_pad_nd.default:
            self._pad(out, *args, **(kwargs or {}))
        elif func is torch.ops.aten.convolution.default:
            self._convolve(out, *args)
        elif any(one is self.conv.weight for one in args):
            raise _OtherError(f"it computes its kernel from its weight at every call; {_FIXED}")
        elif isinstance(out, Tensor):
            raise _OtherError(f"it does more than to pad and to convolve ({func.name().partition('::')[2]})")
        return out

    def _pad(self, out: Tensor, x: Tensor, pads: Sequence[int], value: float = 0) -> None:
        if x is not self.map or value != 0 or len(pads) > 4 or min(pads) < 0:
            raise _OtherError("it pads something else than its input, or with something else than zeros")
        left, right, top, bottom = (*pads, 0, 0)[:4]
        self._add(out, (top, bottom, left, right))

    def _add(self, out: Tensor, sides: Sides) -> None:
        top, bottom, left, right = (had + more for had, more in zip(self.pads, sides, strict=True))
        self.map, self.pads = out, (top, bottom, left, right)

    def _convolve(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> None:
        stride, (ph, pw), dilation, is_transposed, _, groups = how
        if weight is not self.conv.weight or bias is not self.conv.bias:
            raise _OtherError(f"it convolves with other tensors than its weight and bias; {_FIXED}")
        if x is not self.map or is_transposed:
            raise _OtherError("it convolves something else than its input")
        self._add(out, (ph, ph, pw, pw))
        self.result, self.convolved = out, (tuple(stride), tuple(dilation), groups)
