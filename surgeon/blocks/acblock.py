"""ACBlock: a k×k, a k×1 and a 1×k convolution side by side, each with its own norm, summed.

    y = bn_s(F_s∗x) + bn_v(F_v∗x) + bn_h(F_h∗x)

Trained, it strengthens the middle row and column (the skeleton) of the kernel; folded, it is one k×k convolution:

    F = γ_s/σ_s·F_s + γ_v/σ_v·F_v (laid on column c) + γ_h/σ_h·F_h (laid on row r),   b = Σ β − μ·γ/σ

A strip that lies on row r of a kernel of height k sees what that row sees: its input is padded by p − r·d above and by
p − (k−1−r)·d below, where a negative number crops.

Ding et al. 2019, ACNet, arXiv:1908.03930, section 3 and eq. 4–6; placement `border` is its control experiment (4.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from surgeon.blocks import base, in_one_step
from surgeon.blocks.base import Trial
from surgeon.blocks.in_one_step import Part, is_scripting
from surgeon.blocks.online import Online, Shape
from surgeon.blocks.parallel import Branch, Parallel, ParallelOptions, fresh_norm, placed
from surgeon.conv import kernels
from surgeon.conv.affine import Affine
from surgeon.conv.scaled_sum import Window
from surgeon.conv.spec import ConvSpec, Pads


class ACBlockOptions(ParallelOptions):
    """How an ACBlock starts and where its strips lie."""

    placement: Literal["skeleton", "border"] = Field(
        "skeleton", description="strips on the middle row and column, or on the last ones (the paper's control)"
    )


class ACBlock(Parallel[ACBlockOptions]):
    """Three parallel branches for one k×k conv: (n, c_in, h, w) → (n, c_out, h', w').

    Submodules are named as in the published code, so its checkpoints load.
    """

    __module__ = "surgeon.nn"

    name = "acblock"
    title = "k×k + k×1 + 1×k branches, each with a norm; folds back to one conv"
    paper = "Ding et al. 2019, ACNet, arXiv:1908.03930"
    Options = ACBlockOptions
    pads_its_input = True
    first_conv, first_norm = "square_conv", "square_bn"
    DERIVED = frozenset({"row", "column", "ver_shift", "hor_shift", "pads_first"})

    def __init__(self, spec: ConvSpec, norm: nn.Module, *, like: Tensor, placement: str = "skeleton") -> None:
        """Lay out the branches with tensors like `like`, uninitialised kernels, and norms like `norm`."""
        super(Parallel, self).__init__()
        self.spec = spec.change(bias=False)
        self.placement = placement
        self.derive_()
        (ver_spec, _), (hor_spec, _) = self._strips()
        self.square_conv = self.spec.inner.build(like=like)
        self.square_bn = norm  # of any class, and what it does in train mode is its own affair
        self.ver_conv = ver_spec.build(like=like)
        self.ver_bn = fresh_norm(norm)
        self.hor_conv = hor_spec.build(like=like)
        self.hor_bn = fresh_norm(norm)

    def derive_(self) -> None:
        """Find where the strips lie, and how their inputs are shifted where their own padding cannot do it."""
        kh, kw = self.spec.kernel
        self.row, self.column = (kh // 2, kw // 2) if self.placement == "skeleton" else (kh - 1, kw - 1)
        (_, self.ver_shift), (_, self.hor_shift) = self._strips()
        self.pads_first = None if self.spec.pads_input is None else self.spec

    def _strips(self) -> tuple[tuple[ConvSpec, Pads | None], tuple[ConvSpec, Pads | None]]:
        """Give the specs of the two strips, the vertical one first, and their shifts."""
        kh, kw = self.spec.kernel
        inner = self.spec.inner
        return inner.part((kh, 1), row=0, column=self.column), inner.part((1, kw), row=self.row, column=0)

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: ACBlockOptions) -> str | None:
        kh, kw = spec.kernel
        if spec.kernel == (1, 1):
            return "a 1x1 kernel has no rows and columns to strengthen"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {kh}x{kw} has no centre: {even[0]} is even"
        if 1 in spec.kernel:
            return f"kernel {kh}x{kw} is a strip already"
        return None

    @classmethod
    def layout_of(cls, options: ACBlockOptions) -> dict[str, Any]:
        return {"placement": options.placement}

    @classmethod
    def online(cls) -> type[Online]:
        return OnlineACBlock

    @classmethod
    def trials(cls) -> Iterator[Trial]:
        specs = [
            ConvSpec(4, 6, (3, 3), padding=(1, 1)),
            ConvSpec(4, 6, (3, 3), padding=(1, 1), bias=False, stride=(2, 2)),
            ConvSpec(4, 8, (5, 3), padding=(1, 0), dilation=(1, 2), groups=2),
            ConvSpec(6, 6, (3, 3), padding="same", dilation=(2, 1), groups=6, padding_mode="reflect"),
        ]
        for spec in specs:
            for placement in ("skeleton", "border"):
                for init in ("takeover", "split", "scratch"):
                    options = ACBlockOptions.model_validate({"init": init, "placement": placement})
                    yield Trial(spec, options)
                    yield Trial(spec, options, with_norm=True)
                    yield Trial(spec, options.model_copy(update={"form": "online"}))

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.pads_first is None else self.pads_first.padded(input)
        ver = hor = x
        if self.ver_shift is not None:
            ver = kernels.shift(x, self.ver_shift, self.spec.padding_mode)
        if self.hor_shift is not None:
            hor = kernels.shift(x, self.hor_shift, self.spec.padding_mode)
        if not is_scripting():  # scripts are made of the lines below
            parts = [
                Part(x, self.square_conv, self.square_bn),
                Part(ver, self.ver_conv, self.ver_bn),
                Part(hor, self.hor_conv, self.hor_bn),
            ]
            if in_one_step.fits(parts):
                return in_one_step.run(parts)
        square = self.square_bn(self.square_conv(x))
        return square + self.ver_bn(self.ver_conv(ver)) + self.hor_bn(self.hor_conv(hor))  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> Self:
        if self.ver_shift is not None or self.hor_shift is not None:
            raise base.unscriptable(self, " whose strips see a shifted input, unless it is fused first")
        if self.pads_first is not None:
            raise base.unscriptable(self, " that pads its input first, unless it is fused first")
        return self

    def role(self) -> base.Role:
        return {"placement": self.placement}

    def branches(self) -> tuple[Branch, ...]:
        mode = self.spec.padding_mode
        return (
            Branch(Affine.of_conv(self.square_conv), self.square_bn, ("square_conv",)),
            Branch(placed(self.ver_conv, self.ver_shift, mode), self.ver_bn, ("ver_conv",)),
            Branch(placed(self.hor_conv, self.hor_shift, mode), self.hor_bn, ("hor_conv",)),
        )

    def parts(self) -> Iterator[tuple[str, ConvSpec | None]]:
        (ver_spec, _), (hor_spec, _) = self._strips()
        yield from (("square_bn", None), ("ver_bn", None), ("hor_bn", None))
        yield from (("square_conv", self.spec.inner), ("ver_conv", ver_spec), ("hor_conv", hor_spec))

    def extra_repr(self) -> str:
        return f"{self.spec}, placement={self.placement}"


class OnlineACBlock(Online[ACBlockOptions], ACBlock):
    """The strips are added to the kernel before the convolution: y = (s₀⊙F_s + s₁⊙F_v + s₂⊙F_h)∗x."""

    __module__ = "surgeon.nn"

    if TYPE_CHECKING:
        ver_weight: Tensor
        hor_weight: Tensor

    gives_norm_back = False
    starts = (0.25, 0.25, 0.25)
    summand_names = ("ver_weight", "hor_weight")

    @classmethod
    def laid_out(cls, spec: ConvSpec, placement: str = "skeleton") -> dict[str, Any]:
        return {"placement": placement}

    def shapes(self) -> dict[str, Shape]:
        out, channels, kh, kw = self.spec.weight_shape
        return {"ver_weight": (out, channels, kh, 1), "hor_weight": (out, channels, 1, kw)}

    def summands(self) -> list[Tensor | None]:
        return [self.ver_weight, self.hor_weight]

    def places(self) -> list[Window]:
        kh, kw = self.spec.kernel
        row, column = (kh // 2, kw // 2) if self.placement == "skeleton" else (kh - 1, kw - 1)
        return [(0, column, kh, 1), (row, 0, 1, kw)]
