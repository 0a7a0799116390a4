"""An algebra of convolutions with a bias, in float64: sums, sequences and scales of them are one again.

    y[o, p] = b[o] + Σ K[o, c, t]·x[c, s·p + d·t − before]      on each axis, with zeros (or a mirror …) beyond x

Two that see the same map add up to one whose kernel has the taps of both, if they have the same stride: taps lie where
they lie, on the coarsest grid that holds all of them. One after the other they are one, too,

    K[o, c, s₁·d₂·t₂ + d₁·t₁] = Σ K₂[o, m, t₂]·K₁[m, c, t₁],   before = before₁ + s₁·before₂,   b = b₂ + Σ K₂·b₁,

but not where the second one pads: it sees zeros around the map between them, and not what the first would give there.
That is the same only if the first has one tap on that axis, no padding and no bias. A mirror of a map that comes pixel
by pixel from another one is the mirror of that one, whatever the bias.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from surgeon.conv.axis import Axis, NotOneConvError
from surgeon.conv.kernels import Norm
from surgeon.conv.spec import ConvSpec, Pads


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A convolution with a bias, in float64.

    Attributes:
        kernel: (out, in/groups, kh, kw).
        bias: (out,).
        rows, columns: where the taps lie.
        mode: what is beyond the map, as `nn.Conv2d` names it; it says nothing where nothing is padded.
        macs: multiply-adds for each pixel that comes out, as it was written; pooling, norms and scales count none.
    """

    kernel: Tensor
    bias: Tensor
    rows: Axis
    columns: Axis
    groups: int = 1
    mode: str = "zeros"
    macs: float = 0.0

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Self:
        """Read a conv of a spec.

        Raises:
            NotOneConvError: how it pads depends on the size of the map.
        """
        if spec.pads_input == "same" and spec.stride != (1, 1):
            raise NotOneConvError("how it pads depends on the size of the map (TensorFlow's SAME)")
        kernel = weight.detach().double()
        added = kernel.new_zeros(spec.c_out) if bias is None else bias.detach().double()
        (sh, sw), (dh, dw), pads = spec.stride, spec.dilation, spec.pads
        rows = Axis(spec.kernel[0], sh, dh, pads.top, pads.bottom)
        columns = Axis(spec.kernel[1], sw, dw, pads.left, pads.right)
        return cls(kernel, added, rows, columns, spec.groups, spec.padding_mode, float(kernel.numel()))

    @classmethod
    def of_conv(cls, conv: nn.Conv2d) -> Self:
        """Read one of torch's own convs."""
        return cls.of(conv.weight, conv.bias, ConvSpec.of(conv))

    @classmethod
    def scale(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Multiply every channel by its number (channels,), and add one."""
        weight = weight.detach().double()
        added = torch.zeros_like(weight) if bias is None else bias.detach().double()
        return cls(weight[:, None, None, None], added, Axis(1), Axis(1), len(weight))

    @classmethod
    def identity(cls, channels: int, *, like: Tensor | None = None) -> Self:
        """Leave a map as it is."""
        return cls.scale(torch.ones(channels, dtype=torch.float64, device=None if like is None else like.device))

    @classmethod
    def norm(cls, norm: Norm) -> Self:
        """Read a batch norm in eval mode."""
        numbers = norm.double()
        scale = numbers.weight / torch.sqrt(numbers.var + numbers.eps)
        return cls.scale(scale, numbers.bias - numbers.mean * scale)

    @classmethod
    def mean(cls, channels: int, rows: Axis, columns: Axis, *, divisor: float | None = None) -> Self:
        """Average what every channel has under a window; rows and columns that were padded count as zeros."""
        window = torch.ones(channels, 1, rows.kernel, columns.kernel, dtype=torch.float64)
        kernel = window / (divisor or rows.kernel * columns.kernel)
        return cls(kernel, torch.zeros(channels, dtype=torch.float64), rows, columns, channels)

    @classmethod
    def pad(cls, channels: int, pads: Pads, mode: str = "zeros") -> Self:
        """Pad a map, or crop it where a number is negative."""
        rows, columns = Axis(1, before=pads.top, after=pads.bottom), Axis(1, before=pads.left, after=pads.right)
        return replace(cls.identity(channels), rows=rows, columns=columns, mode=mode)

    @classmethod
    def take(cls, channels: int, index: Sequence[int]) -> Self:
        """Take some channels in some order."""
        kernel = torch.eye(channels, dtype=torch.float64)[list(index), :, None, None]
        return cls(kernel, torch.zeros(len(index), dtype=torch.float64), Axis(1), Axis(1))

    @property
    def c_in(self) -> int:
        return self.kernel.shape[1] * self.groups

    @property
    def c_out(self) -> int:
        return len(self.kernel)

    @property
    def axes(self) -> tuple[Axis, Axis]:
        return self.rows, self.columns

    @property
    def pads(self) -> bool:
        """Whether it sees anything beyond the map."""
        return any(side > 0 for axis in self.axes for side in (axis.before, axis.after))

    def to(self, device: torch.device) -> Self:
        """Move it; on the meta device it says of what shape it is, and what it costs."""
        return replace(self, kernel=self.kernel.to(device), bias=self.bias.to(device))

    def scaled(self, factor: Tensor | float) -> Self:
        """Multiply what comes out, all of it or channel by channel (out,).

        >>> Affine.identity(2).scaled(3.0).kernel.flatten()
        tensor([3., 3.], dtype=torch.float64)
        """
        if isinstance(factor, Tensor):
            factor = factor.detach().double().to(self.kernel.device)
            return replace(self, kernel=self.kernel * factor.view(-1, 1, 1, 1), bias=self.bias * factor)
        return replace(self, kernel=self.kernel * factor, bias=self.bias * factor)

    def __add__(self, other: Affine) -> Affine:
        """Give the sum of two that see the same map.

        >>> (Affine.identity(2) + Affine.identity(2)).kernel.flatten()
        tensor([2., 2.], dtype=torch.float64)

        Raises:
            NotOneConvError: they have other strides, sizes, or see different things beyond the map.
        """
        if (self.c_in, self.c_out) != (other.c_in, other.c_out):
            raise NotOneConvError("branches have different channels")
        first, second = aligned((self, other), math.gcd(self.groups, other.groups))
        return replace(
            first, kernel=first.kernel + second.kernel, bias=self.bias + other.bias, macs=self.macs + other.macs
        )

    def __sub__(self, other: Affine) -> Affine:
        return self + other.scaled(-1.0)

    def then(self, other: Affine) -> Affine:
        """Give this one followed by another one.

        >>> Affine.identity(2).then(Affine.scale(torch.tensor([1.0, 5.0]))).kernel.flatten()
        tensor([1., 5.], dtype=torch.float64)

        Raises:
            NotOneConvError: the second sees zeros, or mirrors, where the first would give something else.
        """
        if self.c_out != other.c_in:
            raise NotOneConvError(f"{self.c_out} channels are read as {other.c_in}")
        other = other.to(self.kernel.device)
        mode = _mode_between(self, other)
        rows, columns = (one.then(two) for one, two in zip(self.axes, other.axes, strict=True))
        pixels = other.rows.stride * other.columns.stride
        bias = other.bias + _summed(other, self.bias)
        kernel, groups = _product(self, other, (rows, columns))
        return Affine(kernel, bias, rows, columns, groups, mode, self.macs * pixels + other.macs)

    def spec(self) -> ConvSpec:
        """Give the spec of the conv that does the same.

        Raises:
            NotOneConvError: no conv pads like that.
        """
        whole = self.uncropped()
        pads = Pads(whole.rows.before, whole.rows.after, whole.columns.before, whole.columns.after)
        if not pads.is_symmetric and self.mode != "zeros":
            raise NotOneConvError(f"no conv pads its sides unequally ({', '.join(map(str, pads))}) in mode {self.mode}")
        return ConvSpec(
            whole.c_in,
            whole.c_out,
            (whole.rows.kernel, whole.columns.kernel),
            stride=(whole.rows.stride, whole.columns.stride),
            padding=(pads.top, pads.left) if pads.is_symmetric else (0, 0),
            dilation=(whole.rows.dilation, whole.columns.dilation),
            groups=whole.groups,
            padding_mode=whole.mode if whole.pads else "zeros",
            pads_input=None if pads.is_symmetric else (pads.top, pads.bottom, pads.left, pads.right),
        )

    def conv(self, *, like: Tensor) -> nn.Conv2d:
        """Make the conv, cast once to the dtype of `like`.

        Raises:
            NotOneConvError: no conv pads like that. PlanError: the dtype does not hold one of its numbers.
        """
        return self.spec().build_with(self.uncropped().kernel, self.bias, like=like)

    def uncropped(self) -> Self:
        """Give the same with taps of zero in place of rows and columns that are cropped."""
        rows, columns = self.rows.uncropped(), self.columns.uncropped()
        if (rows, columns) == self.axes:
            return self
        places = [axis.places_of(own) for axis, own in zip((rows, columns), self.axes, strict=True)]
        return replace(self, kernel=_spread(self.kernel, (rows, columns), places), rows=rows, columns=columns)

    def __call__(self, x: Tensor) -> Tensor:
        """Do it to a map (n, in, h, w)."""
        made: Tensor = self.conv(like=x)(x)
        return made


def side_by_side(parts: Sequence[Affine]) -> Affine:
    """Give one that has the channels of several, which see the same map, one after the other.

    Raises:
        NotOneConvError: as for a sum.
    """
    each = aligned(parts, 1)
    kernel, bias = (torch.cat([getattr(one, name) for one in each]) for name in ("kernel", "bias"))
    return replace(each[0], kernel=kernel, bias=bias, macs=sum(one.macs for one in parts))


def total(parts: Sequence[Affine]) -> Affine:
    """Give the sum of several."""
    return functools.reduce(operator.add, parts)


def aligned(parts: Sequence[Affine], groups: int) -> list[Affine]:
    """Give all of them with kernels of one shape, whose taps lie at the same places."""
    modes = {one.mode for one in parts if one.pads}
    if len(modes) > 1:
        raise NotOneConvError(f"branches pad in the modes {' and '.join(sorted(modes))}")
    mode = modes.pop() if modes else parts[0].mode
    axes = [Axis.around([one.axes[i] for one in parts]) for i in range(2)]
    made = []
    for one in (part.to(parts[0].kernel.device) for part in parts):
        places = [axis.places_of(own) for axis, own in zip(axes, one.axes, strict=True)]
        kernel = _spread(regrouped(one.kernel, one.groups, groups), axes, places)
        made.append(replace(one, kernel=kernel, rows=axes[0], columns=axes[1], groups=groups, mode=mode))
    return made


def regrouped(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """Write a kernel (out, in/groups, kh, kw) with fewer groups, of which each holds several of its own.

    >>> regrouped(torch.ones(2, 1, 1, 1), 2, 1)[:, :, 0, 0]
    tensor([[1., 0.],
            [0., 1.]])
    """
    if groups == fewer:
        return kernel
    out, channels, *size = kernel.shape
    within = groups // fewer
    made = kernel.new_zeros(groups, out // groups, within, channels, *size)
    which = torch.arange(groups, device=kernel.device)
    made[which, :, which % within] = kernel.reshape(groups, out // groups, channels, *size)
    return made.reshape(out, within * channels, *size)


def _mode_between(first: Affine, second: Affine) -> str:
    """Say what is beyond the map of a sequence; see the top of this file."""
    if not second.pads:
        return first.mode
    if second.mode != "zeros":
        if not all(axis.is_point and axis.stride == 1 for axis in first.axes):
            raise NotOneConvError(f"padding in mode {second.mode} lies between two convs")
        return second.mode
    for one, two in zip(first.axes, second.axes, strict=True):
        if max(two.before, two.after) > 0 and not one.is_point:
            raise NotOneConvError("zeros that lie between two convs are not what the first gives there")
    if not first.bias.is_meta and bool((first.bias != 0).any()):
        raise NotOneConvError("zeros that lie between two convs are not the bias that the first gives there")
    if first.pads and first.mode != "zeros":
        raise NotOneConvError(f"one pads in mode {first.mode}, the next with zeros")
    return "zeros"


def _summed(second: Affine, bias: Tensor) -> Tensor:
    """What the second of a sequence makes of the bias of the first."""
    per_group = bias.view(second.groups, -1)  # (groups, in/groups)
    taps = second.kernel.sum((2, 3)).view(second.groups, -1, per_group.shape[1])
    return torch.einsum("goi,gi->go", taps, per_group).flatten()


def _product(first: Affine, second: Affine, axes: Sequence[Axis]) -> tuple[Tensor, int]:
    """Multiply the kernels of a sequence; returns it and its groups."""
    one, two = first.kernel.flatten(2), second.kernel.flatten(2)  # (out, in/groups, taps)
    if second.groups == second.c_in == second.c_out:
        taps, groups = one[:, :, None] * two[:, :, :, None], first.groups
    elif first.groups == first.c_in == first.c_out:
        within = one[:, 0].view(second.groups, 1, -1, 1, one.shape[2])
        taps, groups = two.view(second.groups, -1, *two.shape[1:])[..., None] * within, second.groups
        taps = taps.flatten(0, 1)
    else:
        groups = math.gcd(first.groups, second.groups)
        one = regrouped(first.kernel, first.groups, groups).flatten(2)
        two = regrouped(second.kernel, second.groups, groups).flatten(2)
        one, two = (each.view(groups, -1, *each.shape[1:]) for each in (one, two))
        taps = torch.einsum("gomp,gmiq->goipq", two, one).flatten(0, 1)  # (out, in/groups, taps₂, taps₁)
    taps = taps.reshape(*taps.shape[:2], *second.kernel.shape[2:], *first.kernel.shape[2:])
    if second.kernel.shape[2:] == (1, 1) and taps.shape[4:] == tuple(axis.kernel for axis in axes):
        return taps[:, :, 0, 0], groups  # no tap moves
    made = taps.new_zeros(*taps.shape[:2], *(axis.kernel for axis in axes))
    (rows, under), (columns, beside) = (a.places(b) for a, b in zip(first.axes, second.axes, strict=True))
    for i, down in enumerate(under):
        for j, right in enumerate(beside):
            where_rows = torch.tensor([row + down for row in rows], device=made.device)
            where_columns = torch.tensor([column + right for column in columns], device=made.device)
            made[:, :, where_rows[:, None], where_columns] += taps[:, :, i, j]
    return made, groups


def _spread(kernel: Tensor, axes: Sequence[Axis], places: Sequence[Sequence[int]]) -> Tensor:
    """Lay the taps of a kernel at their places in a larger one."""
    size = tuple(axis.kernel for axis in axes)
    if kernel.shape[2:] == size:
        return kernel
    rows, columns = (torch.tensor(one, device=kernel.device) for one in places)
    made = kernel.new_zeros(*kernel.shape[:2], *size)
    made[:, :, rows[:, None], columns] = kernel
    return made
