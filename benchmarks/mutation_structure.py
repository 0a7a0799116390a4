"""Faults in what a network does with its numbers: attributes of convs, other layers in place, hooks, outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mutation_faults import NotHereError, Subject, fault, wide
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from surgeon.nn import FusedOctave, OctaveConv

# ---- attributes of one conv -----------------------------------------------------------------------------------------


def on_conv(
    name: str, change: Callable[[nn.Conv2d], Any], where: Callable[[nn.Conv2d], bool], right: bool = False
) -> None:
    def put(subject: Subject) -> str:
        path, conv = subject.conv(where)
        change(conv)
        return path

    fault(name, is_right=right)(put)


def _is_padded(conv: nn.Conv2d) -> bool:
    return wide(conv) and conv.padding != (0, 0) and not isinstance(conv.padding, str)


def _pad_modes(conv: nn.Conv2d, mode: str) -> None:
    conv.padding_mode = mode


def _same(conv: nn.Conv2d) -> None:
    """Padding 'same' is the sizes that padding had."""
    sides = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    assert conv.padding == tuple(side // 2 for side in sides)
    conv.padding = "same"


def _is_same(conv: nn.Conv2d) -> bool:
    sides = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return conv.stride == (1, 1) and wide(conv) and conv.padding == tuple(side // 2 for side in sides)


on_conv("padding mode lost", lambda c: _pad_modes(c, "zeros"), lambda c: c.padding_mode != "zeros")
on_conv(
    "padding mode circular", lambda c: _pad_modes(c, "circular"), lambda c: _is_padded(c) and c.padding_mode == "zeros"
)
on_conv(
    "padding forgotten", lambda c: setattr(c, "padding", (0, 0)), lambda c: _is_padded(c) and c.padding_mode == "zeros"
)
on_conv("dilation lost", lambda c: setattr(c, "dilation", (1, 1)), lambda c: c.dilation != (1, 1))
on_conv("stride lost", lambda c: setattr(c, "stride", (1, 1)), lambda c: c.stride != (1, 1))
on_conv("padding 'same' of the same size", _same, lambda c: _is_same(c) and c.padding_mode == "zeros", right=True)


class Shifted(nn.Conv2d):
    """A conv whose padding lies on the wrong sides."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.padding
        padded = F.pad(x, (int(w) - 1, int(w) + 1, int(h) - 1, int(h) + 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class FlippedBatch(nn.Conv2d):
    """A conv that gives the images of a batch in the opposite order."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(0)


def as_class(conv: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    """Give the same conv, as an instance of another class."""
    new = copy.copy(conv)
    new.__class__ = kind
    return new


@fault("padding on the wrong sides")
def _(subject: Subject) -> str:
    path, conv = subject.conv(lambda c: _is_padded(c) and c.padding_mode == "zeros")
    return subject.put(path, as_class(conv, Shifted))


@fault("a conv flips the batch")
def _(subject: Subject) -> str:
    path, conv = subject.conv()
    return subject.put(path, as_class(conv, FlippedBatch))


@fault("a stride moved to the next conv")
def _(subject: Subject) -> str:
    path, conv = subject.conv(lambda c: c.stride != (1, 1))
    after = list(dict(subject.b.named_modules()))
    rest = [p for p in after[after.index(path) + 1 :] if isinstance(subject.b.get_submodule(p), nn.Conv2d)]
    if not rest:
        raise NotHereError
    other: nn.Conv2d = subject.b.get_submodule(rest[0])  # type: ignore[assignment]
    conv.stride, other.stride = other.stride, conv.stride
    return path


# ---- other layers in place ------------------------------------------------------------------------------------------


def exchange(
    name: str, old: type[nn.Module], new: Callable[[Any], nn.Module], where: Callable[[Any], bool] = lambda m: True
) -> None:
    """Name a fault that puts another layer in the place of one."""

    def put(subject: Subject) -> str:
        path = subject.pick(old, where=lambda m: type(m) is old and where(m))
        return subject.put(path, new(subject.b.get_submodule(path)))

    fault(name)(put)


def _changed(module: nn.Module, **changes: object) -> nn.Module:
    new = copy.deepcopy(module)
    vars(new).update(changes)
    return new


def _without_statistics(norm: nn.BatchNorm2d) -> nn.Module:
    new = _changed(norm, track_running_stats=False)
    new.running_mean = new.running_var = None  # type: ignore[assignment]
    return new


exchange("ReLU6 for ReLU", nn.ReLU, lambda m: nn.ReLU6())
exchange("a clip at 100 for ReLU", nn.ReLU, lambda m: nn.Hardtanh(0, 100))
exchange("ReLU for ReLU6", nn.ReLU6, lambda m: nn.ReLU())
exchange("leaky ReLU for ReLU", nn.ReLU, lambda m: nn.LeakyReLU(0.01))
exchange("another slope of leaky ReLU", nn.LeakyReLU, lambda m: nn.LeakyReLU(0.02))
exchange("SiLU for hard-swish", nn.Hardswish, lambda m: nn.SiLU())
exchange("sigmoid for hard-sigmoid", nn.Hardsigmoid, lambda m: nn.Sigmoid())
exchange("log-softmax for softmax", nn.Softmax, lambda m: nn.LogSoftmax(1))
exchange("max for average pooling", nn.AvgPool2d, lambda m: nn.MaxPool2d(m.kernel_size, m.stride, m.padding))
exchange("average for max pooling", nn.MaxPool2d, lambda m: nn.AvgPool2d(m.kernel_size, m.stride, m.padding))
exchange("count_include_pad", nn.AvgPool2d, lambda m: _changed(m, count_include_pad=not m.count_include_pad))
exchange("ceil_mode", nn.AvgPool2d, lambda m: _changed(m, ceil_mode=not m.ceil_mode))
exchange("ceil_mode of max pooling", nn.MaxPool2d, lambda m: _changed(m, ceil_mode=not m.ceil_mode))
exchange("another interpolation", nn.Upsample, lambda m: nn.Upsample(scale_factor=m.scale_factor, mode="bilinear"))
exchange("a global maximum for the mean", nn.AdaptiveAvgPool2d, lambda m: nn.AdaptiveMaxPool2d(1))
exchange("a norm of the batch's own statistics", nn.BatchNorm2d, lambda m: _without_statistics(m))


@fault("a pooling of fixed size for a global one")
def _(subject: Subject) -> str:
    path = subject.pick(nn.AdaptiveAvgPool2d)
    sizes: list[int] = []
    hook = subject.a.get_submodule(path).register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-1]))
    probe = torch.zeros(2, 3, 16, 16, dtype=next(subject.a.parameters()).dtype)
    subject.a.eval()(probe)
    hook.remove()
    if sizes[0] == 1:
        raise NotHereError
    return subject.put(path, nn.AvgPool2d(sizes[0]))


class Active(nn.Module):
    """A dropout that drops in eval mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * 0.01


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Then(nn.Sequential):
    """A layer, and something after it that does not belong there."""


def _activations(m: nn.Module) -> bool:
    return isinstance(m, nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.LeakyReLU)


@fault("an extra ReLU")
def _(subject: Subject) -> str:
    path, conv = subject.conv()
    return subject.put(path, Then(conv, nn.ReLU()))


@fault("a dropout that stays active")
def _(subject: Subject) -> str:
    return subject.put(subject.pick(nn.Dropout, nn.ReLU, nn.Hardswish), Active())


@fault("random noise at a layer")
def _(subject: Subject) -> str:
    path = subject.pick(nn.Module, where=_activations)
    return subject.put(path, Then(subject.b.get_submodule(path), Noisy()))


@fault("height and width exchanged")
def _(subject: Subject) -> str:
    path = subject.pick(nn.Module, where=_activations)
    return subject.put(path, Then(subject.b.get_submodule(path), Turned()))


@fault("a layer skipped")
def _(subject: Subject) -> str:
    return subject.put(subject.pick(nn.Module, where=_activations), nn.Identity())


@fault("a conv skipped")
def _(subject: Subject) -> str:
    path, _conv = subject.conv(lambda c: c.in_channels == c.out_channels and c.stride == (1, 1))
    return subject.put(path, nn.Identity())


def scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.01


def scale_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 1.01, *args[1:])


@fault("a hook scales a layer's output")
def _(subject: Subject) -> str:
    path, conv = subject.conv()
    conv.register_forward_hook(scale_output)
    return path


@fault("a hook scales a layer's input")
def _(subject: Subject) -> str:
    path, conv = subject.conv()
    conv.register_forward_pre_hook(scale_input)
    return path


# ---- the whole network ----------------------------------------------------------------------------------------------


def on_output(name: str, change: Callable[[Any], Any], where: Callable[[Any], bool] = lambda out: True) -> None:
    """Name a fault in what the network gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return change(output)

    def put(subject: Subject) -> None:
        probe = torch.zeros(2, 3, 16, 16, dtype=next(subject.a.parameters()).dtype)
        with torch.no_grad():
            if not where(subject.a.eval()(probe)):
                raise NotHereError
        subject.b.register_forward_hook(hook)

    fault(name)(put)


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda output: pytree.tree_map(change, output)


def _is_float(output: Any) -> bool:
    return pytree.tree_leaves(output)[0].is_floating_point()


def _other(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.dtype != torch.float32 else torch.float64)


on_output("labels off by one", _each(lambda y: y + 1), lambda out: not _is_float(out))
on_output(
    "one label in a hundred wrong",
    _each(lambda y: y + (torch.arange(y.numel()).reshape(y.shape) % 100 == 0)),
    lambda out: not _is_float(out),
)
on_output("outputs in another dtype", _each(_other))
on_output("the batch flipped", _each(lambda y: y.flip(0)))
on_output("an output too many", lambda out: (out, out))
on_output("the second output lost", lambda out: out[:1], lambda out: isinstance(out, tuple))
on_output("outputs in another order", lambda out: out[::-1], lambda out: isinstance(out, tuple))
on_output(
    "outputs under other names", lambda out: {"map": out["aux"], "aux": out["map"]}, lambda out: isinstance(out, dict)
)
on_output("outputs scaled by 1.001", _each(lambda y: y * 1.001), _is_float)
on_output(
    "one output is NaN",
    _each(lambda y: torch.where(torch.arange(y.numel()).reshape(y.shape) == 1, float("nan"), y)),
    _is_float,
)


@fault("an unused parameter in another dtype")
def _(subject: Subject) -> None:
    other = torch.float64 if next(subject.b.parameters()).dtype != torch.float64 else torch.float32
    subject.b.register_parameter("unused", nn.Parameter(torch.ones(1, dtype=other)))


@fault("an extra parameter")
def _(subject: Subject) -> str:
    path, conv = subject.conv()
    conv.register_parameter("unused", nn.Parameter(torch.ones_like(conv.weight[:1])))
    return path


@fault("an extra buffer")
def _(subject: Subject) -> None:
    subject.b.register_buffer("unused", torch.ones(1))


# ---- octaves --------------------------------------------------------------------------------------------------------


def _convs_of_octaves(subject: Subject) -> tuple[str, nn.Module]:
    path = subject.pick(FusedOctave, OctaveConv)
    return path, subject.b.get_submodule(path)


@fault("the low path of an octave conv swaps two channels")
def _(subject: Subject) -> str:
    path, block = _convs_of_octaves(subject)
    weights = [p for n, p in block.named_parameters() if p.ndim == 4 and len(p) > 1]
    if not weights:
        raise NotHereError
    last = weights[-1].data
    last[[0, 1]] = last[[1, 0]].clone()
    return path


@fault("an octave conv's output one pixel off")
def _(subject: Subject) -> str:
    path, block = _convs_of_octaves(subject)
    block.register_forward_hook(roll_output)
    return path


def roll_output(module: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map(lambda y: y.roll(1, -1), output)
