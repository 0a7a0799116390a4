"""RepVGG: a k×k conv, a 1×1 conv and the map itself side by side, each with its own norm, summed.

    y = bn_k(F_k∗x) + bn_1(F_1∗x) + bn_0(x)      the last only where the conv keeps channels and pixels where they are

Folded, it is one k×k convolution: the 1×1 kernel and the identity lie on its centre tap.

    F = γ_k/σ_k·F_k + centre(γ_1/σ_1·F_1 + γ_0/σ_0·I),   b = Σ β − μ·γ/σ

Ding et al. 2021, RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697, section 3.3 and eq. 3, 4. The paper
has k = 3; any odd kernel works, as do grouped and depthwise convs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from surgeon.blocks import base
from surgeon.blocks.base import Trial
from surgeon.blocks.online import Online, Shape
from surgeon.blocks.parallel import Branch, Parallel, ParallelOptions, fresh_norm, placed
from surgeon.conv import kernels
from surgeon.conv.affine import Affine
from surgeon.conv.scaled_sum import Window
from surgeon.conv.spec import ConvSpec, Pads

_NAMES = {"conv_kxk": "rbr_dense", "conv_1x1": "rbr_1x1", "identity": "rbr_identity"}  # timm's → the published ones


class RepVGGOptions(ParallelOptions):
    """How a RepVGG block starts."""


class RepVGG(Parallel[RepVGGOptions]):
    """A k×k, a 1×1 and, where it fits, an identity branch for one k×k conv: (n, c_in, h, w) → (n, c_out, h', w').

    Submodules are named as in the published code, so its checkpoints load; those of timm's RepVGG do, too.
    """

    __module__ = "surgeon.nn"

    name = "repvgg"
    title = "k×k + 1×1 + identity branches, each with a norm; folds back to one conv"
    paper = "Ding et al. 2021, RepVGG, arXiv:2101.03697"
    Options = RepVGGOptions
    pads_its_input = True
    first_conv, first_norm = "rbr_dense.conv", "rbr_dense.bn"
    DERIVED = frozenset({"point_shift", "pads_first"})

    def __init__(self, spec: ConvSpec, norm: nn.Module, *, like: Tensor) -> None:
        """Lay out the branches with tensors like `like`, uninitialised kernels, and norms like `norm`."""
        super(Parallel, self).__init__()
        self.spec = spec.change(bias=False)
        self.derive_()
        self.rbr_dense = conv_and_norm(self.spec.inner.build(like=like), norm)
        self.rbr_1x1 = conv_and_norm(self._point()[0].build(like=like), fresh_norm(norm))
        self.rbr_identity = fresh_norm(norm) if _keeps_pixels(self.spec) else None

    def derive_(self) -> None:
        """Find how the input of the 1×1 conv is shifted where its own padding cannot do it."""
        self.point_shift = self._point()[1]
        self.pads_first = None if self.spec.pads_input is None else self.spec

    def _point(self) -> tuple[ConvSpec, Pads | None]:
        kh, kw = self.spec.kernel
        return self.spec.inner.part((1, 1), row=kh // 2, column=kw // 2)

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: RepVGGOptions) -> str | None:
        if spec.kernel == (1, 1):
            return "a 1x1 kernel is all that the second branch has"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {spec.kernel[0]}x{spec.kernel[1]} has no centre: {even[0]} is even"
        return None

    @classmethod
    def online(cls) -> type[Online]:
        return OnlineRepVGG

    @classmethod
    def trials(cls) -> Iterator[Trial]:
        specs = [
            ConvSpec(6, 6, (3, 3), padding=(1, 1)),
            ConvSpec(4, 6, (3, 3), padding=(1, 1), bias=False, stride=(2, 2)),
            ConvSpec(8, 8, (5, 3), padding=(1, 0), dilation=(1, 2), groups=2),
            ConvSpec(6, 6, (3, 3), padding="same", dilation=(2, 1), groups=6, padding_mode="reflect"),
        ]
        for spec in specs:
            for init in ("takeover", "split", "scratch"):
                for with_norm in (False, True):
                    yield Trial(spec, RepVGGOptions.model_validate({"init": init}), with_norm=with_norm)
                yield Trial(spec, RepVGGOptions.model_validate({"init": init, "form": "online"}))

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.pads_first is None else self.pads_first.padded(input)
        seen = x
        if self.point_shift is not None:
            seen = kernels.shift(x, self.point_shift, self.spec.padding_mode)
        y: Tensor = self.rbr_dense(x) + self.rbr_1x1(seen)
        return y if self.rbr_identity is None else y + self.rbr_identity(input)

    def __prepare_scriptable__(self) -> Self:
        if self.point_shift is not None or self.pads_first is not None:
            raise base.unscriptable(self, " whose 1×1 conv sees a shifted input, unless it is fused first")
        return self

    def branches(self) -> tuple[Branch, ...]:
        dense, point = (nn.Module.get_submodule(self, name) for name in ("rbr_dense.conv", "rbr_1x1.conv"))
        assert isinstance(dense, nn.Conv2d)
        assert isinstance(point, nn.Conv2d)
        found = [
            Branch(Affine.of_conv(dense), self.get_submodule("rbr_dense.bn"), ("rbr_dense.conv",)),
            Branch(
                placed(point, self.point_shift, self.spec.padding_mode),
                self.get_submodule("rbr_1x1.bn"),
                ("rbr_1x1.conv",),
            ),
        ]
        if self.rbr_identity is not None:
            itself = Affine.identity(self.spec.c_in, like=dense.weight)
            if self.pads_first is not None:  # the others see the padded map
                itself = Affine.pad(self.spec.c_in, Pads(*(-side for side in self.spec.pads))).to(dense.weight.device)
            found.append(Branch(itself, self.rbr_identity))
        return tuple(found)

    def parts(self) -> Iterator[tuple[str, ConvSpec | None]]:
        yield from (("rbr_dense.bn", None), ("rbr_1x1.bn", None))
        if self.rbr_identity is not None:
            yield "rbr_identity", None
        yield from (("rbr_dense.conv", self.spec.inner), ("rbr_1x1.conv", self._point()[0]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the names of timm's RepVGG as well."""
        for theirs, ours in _NAMES.items():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{theirs}.")]:
                state_dict[f"{prefix}{ours}.{key.removeprefix(f'{prefix}{theirs}.')}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return str(self.spec)


class OnlineRepVGG(Online[RepVGGOptions], RepVGG):
    """The 1×1 kernel and the identity are added to the centre tap: y = (s₀⊙F_k + centre(s₁⊙F_1 + s₂⊙I))∗x."""

    __module__ = "surgeon.nn"

    if TYPE_CHECKING:
        point_weight: Tensor

    gives_norm_back = False
    starts = (0.25, 1.0, 1.0)
    summand_names = ("point_weight", "identity")
    DERIVED = Online.DERIVED | {"keeps_pixels"}

    def derive_(self) -> None:
        """Find whether there is an identity, and all that every online form has."""
        self.keeps_pixels = _keeps_pixels(self.spec)
        super().derive_()

    def shapes(self) -> dict[str, Shape]:
        return {"point_weight": (*self.spec.weight_shape[:2], 1, 1)}

    def summands(self) -> list[Tensor | None]:
        made: list[Tensor | None] = [self.point_weight]
        if self.keeps_pixels:
            made.append(None)
        return made

    def places(self) -> list[Window]:
        kh, kw = self.spec.kernel
        return [(kh // 2, kw // 2, 1, 1)] * (1 + self.keeps_pixels)


def conv_and_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Sequential:
    """Put a conv and its norm in a row, under the names of the published code."""
    return nn.Sequential(OrderedDict(conv=conv, bn=norm))


def _keeps_pixels(spec: ConvSpec) -> bool:
    """Whether the centre tap of a conv sees, of every pixel that comes out, the pixel at the same place."""
    (kh, kw), (dh, dw), pads = spec.kernel, spec.dilation, spec.pads
    centre = (kh // 2 * dh, kh // 2 * dh, kw // 2 * dw, kw // 2 * dw)
    return spec.c_in == spec.c_out and spec.stride == (1, 1) and tuple(pads) == centre
