"""Diverse Branch Block: four different branches for one k×k conv, summed; folded, it is one k×k convolution.

    y = bn(F_k∗x) + bn(F_1∗x) + bn(F_k'∗pad(bn(F_1'∗x))) + bn(mean_k(pad(bn(F_1''∗x))))

Between the two convs of a sequence the map is padded, and not with zeros: around it lies what the norm makes of zero,
β − μ·γ/σ, as if the input had been padded. Then the sequence is one convolution with the bias carried through,

    F = F_k'·F_1' (as matrices over channels),  b = Σ F_k'·b_1',    and averaging is a depthwise kernel of 1/k².

Depthwise convs have no 1×1 branch, their mean comes without a conv, and the sequence has twice the channels inside, as
in the published code.

Ding et al. 2021, Diverse Branch Block: Building a Convolution as an Inception-like Unit, arXiv:2103.13425, section 3
(transforms I to VI) and figure 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.blocks import base
from surgeon.blocks.base import Trial
from surgeon.blocks.online import Online, Shape
from surgeon.blocks.parallel import Branch, Parallel, ParallelOptions, fresh_norm, placed
from surgeon.conv import kernels
from surgeon.conv.affine import Affine
from surgeon.conv.axis import Axis
from surgeon.conv.kernels import Norm
from surgeon.conv.scaled_sum import Window, identity_of, in_a_row
from surgeon.conv.spec import ConvSpec, Pads


class DiverseBranchOptions(ParallelOptions):
    """How a Diverse Branch Block starts, and how wide its sequence is."""

    expansion: int | None = Field(
        None,
        ge=1,
        description="how many times the channels of the conv lie between the 1×1 and the k×k conv; 1 unless given, and "
        "2 in depthwise convs",
    )


class DiverseBranch(Parallel[DiverseBranchOptions]):
    """Four branches for one k×k conv: (n, c_in, h, w) → (n, c_out, h', w').

    Submodules are named as in the published code, so its checkpoints load.
    """

    __module__ = "surgeon.nn"

    name = "dbb"
    title = "k×k + 1×1 + 1×1–k×k + 1×1–average branches, each with norms; folds back to one conv"
    paper = "Ding et al. 2021, Diverse Branch Block, arXiv:2103.13425"
    Options = DiverseBranchOptions
    first_conv, first_norm = "dbb_origin.conv", "dbb_origin.bn"
    DERIVED = frozenset({"point_shift"})

    def __init__(self, spec: ConvSpec, norm: nn.Module, *, like: Tensor, expansion: int | None = None) -> None:
        """Lay out the branches with tensors like `like`, uninitialised kernels, and norms like `norm`."""
        super(Parallel, self).__init__()
        self.spec = spec.change(bias=False)
        self.internal = _internal(spec, expansion)
        self.derive_()
        point = self._point()[0]
        self.dbb_origin = _row(conv=self.spec.build(like=like), bn=norm)
        mean = nn.AvgPool2d(spec.kernel, spec.stride, self._sides if _is_depthwise(spec) else 0)
        if _is_depthwise(spec):
            self.dbb_avg, self.dbb_1x1 = _row(avg=mean, avgbn=fresh_norm(norm)), None
        else:
            before = {"conv": self._before(spec.c_out).build(like=like), "bn": _row(bn=fresh_norm(norm))}
            self.dbb_avg = _row(**before, avg=mean, avgbn=fresh_norm(norm))
            self.dbb_1x1 = _row(conv=point.build(like=like), bn=fresh_norm(norm))
        first = {self._first_name: self._before(self.internal).build(like=like)}
        inner = _row(bn=fresh_norm(norm, self.internal))
        second = self._second().build(like=like)
        self.dbb_1x1_kxk = _row(**first, bn1=inner, conv2=second, bn2=fresh_norm(norm))

    def derive_(self) -> None:
        """Find how the input of the 1×1 conv is shifted where its own padding cannot do it."""
        self.point_shift = self._point()[1]

    @property
    def _first_name(self) -> str:
        """The first conv of the sequence starts at the identity if it keeps the channels, and is called so."""
        return "idconv1" if self.internal == self.spec.c_in else "conv1"

    @property
    def _sides(self) -> tuple[int, int]:
        return self.spec.pads.top, self.spec.pads.left

    def _point(self) -> tuple[ConvSpec, Pads | None]:
        kh, kw = self.spec.kernel
        return self.spec.part((1, 1), row=kh // 2, column=kw // 2)

    def _before(self, channels: int) -> ConvSpec:
        return ConvSpec(self.spec.c_in, channels, (1, 1), groups=self.spec.groups, bias=False)

    def _second(self) -> ConvSpec:
        return self.spec.change(c_in=self.internal, padding=(0, 0))

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: DiverseBranchOptions) -> str | None:
        if spec.kernel == (1, 1):
            return "a 1x1 kernel has no room for other branches"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {spec.kernel[0]}x{spec.kernel[1]} has no centre: {even[0]} is even"
        if spec.dilation != (1, 1):
            return "an average cannot be dilated"
        if spec.padding_mode != "zeros":
            return f"padding mode {spec.padding_mode}: between its convs a branch is padded with what a norm makes of 0"
        if any(2 * side > k for side, k in zip((spec.pads.top, spec.pads.left), spec.kernel, strict=True)):
            return "it pads by more than half of its kernel, which an average does not"
        return None

    @classmethod
    def layout_of(cls, options: DiverseBranchOptions) -> dict[str, Any]:
        return {"expansion": options.expansion}

    @classmethod
    def online(cls) -> type[Online]:
        return OnlineDiverseBranch

    @classmethod
    def trials(cls) -> Iterator[Trial]:
        specs = [
            ConvSpec(4, 6, (3, 3), padding=(1, 1)),
            ConvSpec(4, 6, (3, 3), padding=(1, 1), bias=False, stride=(2, 2)),
            ConvSpec(4, 8, (5, 3), padding=(1, 0), groups=2),
            ConvSpec(6, 6, (3, 3), padding="same", groups=6),
        ]
        for spec in specs:
            for init in ("takeover", "split", "scratch"):
                wide = {"expansion": 1} if _is_depthwise(spec) else {}
                for with_norm in (False, True):
                    options = DiverseBranchOptions.model_validate({"init": init, **wide})
                    yield Trial(spec, options, with_norm=with_norm)
                yield Trial(spec, options.model_copy(update={"form": "online"}))
        yield Trial(specs[0], DiverseBranchOptions.model_validate({"expansion": 3, "init": "split"}), with_norm=True)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.dbb_origin(input) + self._sequence(input) + self._mean(input)
        if self.dbb_1x1 is None:
            return y
        seen = input
        if self.point_shift is not None:
            seen = kernels.shift(input, self.point_shift, self.spec.padding_mode)
        return y + self.dbb_1x1(seen)  # type: ignore[no-any-return]

    def _sequence(self, x: Tensor) -> Tensor:
        part, first = self.dbb_1x1_kxk.get_submodule, self._conv(f"dbb_1x1_kxk.{self._first_name}")
        between = F.conv2d(x, self._first_kernel(), None, groups=first.groups)
        made: Tensor = part("bn2")(part("conv2")(self._padded(between, part("bn1.bn"))))
        return made

    def _mean(self, x: Tensor) -> Tensor:
        part = self.dbb_avg.get_submodule
        if self.dbb_1x1 is not None:
            x = self._padded(part("conv")(x), part("bn.bn"))
        made: Tensor = part("avgbn")(part("avg")(x))
        return made

    def _first_kernel(self) -> Tensor:
        """The 1×1 kernel in front of the sequence; where it keeps the channels, what is trained is added to them."""
        weight = self._conv(f"dbb_1x1_kxk.{self._first_name}").weight
        if self._first_name == "conv1":
            return weight
        width = weight.shape[1]
        itself = torch.eye(width, dtype=weight.dtype, device=weight.device).repeat(len(weight) // width, 1)
        return weight + itself[:, :, None, None]

    def _padded(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Norm a map, and put around it what the norm makes of 0, by its running statistics; no gradient goes there."""
        y: Tensor = norm(x)
        height, width = self._sides
        if height == width == 0:
            return y
        numbers = Norm.of(norm)
        border = (numbers.bias - numbers.mean * numbers.weight / torch.sqrt(numbers.var + numbers.eps)).detach()
        sides = (width, width, height, height)
        inside = F.pad(torch.ones_like(y[:1, :1], dtype=torch.bool), sides)
        return torch.where(inside, F.pad(y, sides), border[:, None, None].to(y.dtype))

    def __prepare_scriptable__(self) -> Self:
        raise base.unscriptable(self, ", unless it is fused first")

    def branches(self) -> tuple[Branch, ...]:
        spec, part = self.spec, self.get_submodule
        origin = self._conv("dbb_origin.conv")
        second, bn1 = self._conv("dbb_1x1_kxk.conv2"), part("dbb_1x1_kxk.bn1.bn")
        first = Affine.of(self._first_kernel(), None, self._before(self.internal))
        sequence = self._around(first, bn1).then(Affine.of_conv(second))
        found = [
            Branch(Affine.of_conv(origin), part("dbb_origin.bn"), ("dbb_origin.conv",)),
            Branch(sequence, part("dbb_1x1_kxk.bn2"), (f"dbb_1x1_kxk.{self._first_name}", "dbb_1x1_kxk.conv2")),
        ]
        axes = [Axis(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True)]
        mean = Affine.mean(spec.c_out, axes[0], axes[1]).to(origin.weight.device)
        if self.dbb_1x1 is None:
            pads = Affine.pad(spec.c_in, Pads(*spec.pads)).to(origin.weight.device)
            return (*found, Branch(pads.then(mean), part("dbb_avg.avgbn")))
        before = self._around(Affine.of_conv(self._conv("dbb_avg.conv")), part("dbb_avg.bn.bn"))
        point = self._conv("dbb_1x1.conv")
        return (
            *found,
            Branch(before.then(mean), part("dbb_avg.avgbn"), ("dbb_avg.conv",)),
            Branch(placed(point, self.point_shift, spec.padding_mode), part("dbb_1x1.bn"), ("dbb_1x1.conv",)),
        )

    def _around(self, first: Affine, norm: nn.Module) -> Affine:
        """A 1×1 conv and its norm on the padded map: that is what the border between two convs stands for."""
        padded = Affine.pad(self.spec.c_in, self.spec.pads).to(first.kernel.device)
        return padded.then(first).then(Affine.norm(Norm.of(norm)))

    def parts(self) -> Iterator[tuple[str, ConvSpec | None]]:
        yield from (
            (name, None) for name in ("dbb_origin.bn", "dbb_1x1_kxk.bn1.bn", "dbb_1x1_kxk.bn2", "dbb_avg.avgbn")
        )
        yield from (("dbb_origin.conv", self.spec), ("dbb_1x1_kxk.conv2", self._second()))
        yield f"dbb_1x1_kxk.{self._first_name}", self._before(self.internal)
        if self.dbb_1x1 is not None:
            yield from (("dbb_avg.bn.bn", None), ("dbb_1x1.bn", None))
            yield from (("dbb_avg.conv", self._before(self.spec.c_out)), ("dbb_1x1.conv", self._point()[0]))

    def _draw_(self, convs: Any, generator: torch.Generator) -> None:
        """Draw kernels; what is added to the identity starts at 0."""
        super()._draw_([name for name in convs if not name.endswith("idconv1")], generator)
        for conv in (self._conv(name) for name in convs if name.endswith("idconv1")):
            conv.weight.zero_()

    def role(self) -> base.Role:
        return {"internal": self.internal}

    def extra_repr(self) -> str:
        return f"{self.spec}, internal={self.internal}"


class OnlineDiverseBranch(Online[DiverseBranchOptions], DiverseBranch):
    """All four branches are kernels: y = (s₀⊙F_k + s₁⊙(F_k'·F_1') + s₂⊙mean_k(F_1'') + s₃⊙centre(F_1))∗x.

    Without the norms inside the branches nothing lies around a map between two convs but zeros, as around the input.
    """

    __module__ = "surgeon.nn"

    if TYPE_CHECKING:
        first_weight: Tensor
        second_weight: Tensor
        mean_weight: Tensor
        point_weight: Tensor

    gives_norm_back = False
    starts = (0.25, 0.5, 0.25, 1.0)
    summand_names = ("sequence", "mean", "point_weight")

    @classmethod
    def laid_out(cls, spec: ConvSpec, expansion: int | None = None) -> dict[str, Any]:
        return {"internal": _internal(spec, expansion)}

    def shapes(self) -> dict[str, Shape]:
        out, channels, kh, kw = self.spec.weight_shape
        made: dict[str, Shape] = {
            "first_weight": (self.internal, channels, 1, 1),
            "second_weight": (out, self.internal // self.spec.groups, kh, kw),
        }
        points = (
            {} if _is_depthwise(self.spec) else dict.fromkeys(("mean_weight", "point_weight"), (out, channels, 1, 1))
        )
        return made | points

    def summands(self) -> list[Tensor | None]:
        taps = self.spec.kernel[0] * self.spec.kernel[1]
        if _is_depthwise(self.spec):
            return [self._sequence_kernel(), self.conv_weight.new_full((1, 1, 1, 1), 1 / taps)]
        return [self._sequence_kernel(), self.mean_weight / taps, self.point_weight]

    def places(self) -> list[Window]:
        kh, kw = self.spec.kernel
        whole = (0, 0, kh, kw)
        return [whole, whole] if _is_depthwise(self.spec) else [whole, whole, (kh // 2, kw // 2, 1, 1)]

    def __prepare_scriptable__(self) -> Self:
        raise base.unscriptable(self, ", unless it is fused first")

    def _sequence_kernel(self) -> Tensor:
        first = self.first_weight
        if self._first_name == "idconv1":
            first = first + identity_of(first)
        return in_a_row(first, self.second_weight, self.spec.groups)

    def _draw_parts_(self, factor: float, generator: torch.Generator) -> None:
        """Draw kernels; what is added to the identity starts at 0."""
        super()._draw_parts_(factor, generator)
        if self._first_name == "idconv1":
            self.first_weight.zero_()


def _row(**modules: nn.Module) -> nn.Sequential:
    """Hold modules under the names of the published code."""
    return nn.Sequential(OrderedDict(modules))


def _internal(spec: ConvSpec, expansion: int | None) -> int:
    """How many channels lie inside the sequence."""
    return spec.c_in * (expansion or 1 + _is_depthwise(spec))


def _is_depthwise(spec: ConvSpec) -> bool:
    """Whether every filter sees one channel of its own, which is where published code leaves 1×1 convs out."""
    return spec.groups == spec.c_out == spec.c_in
