"""The online form of blocks of parallel branches: their kernels are summed before the convolution, at every step.

    y = (s₀ ⊙ F₀ + Σ s_i ⊙ F_i)∗x,    s_i a number for each filter, learnt like the kernels

One convolution takes the place of several, and the norm that follows the conv stays where and what it is: the branches
have none of their own. What a norm at the end of a branch does linearly, the scale s_i does; norms inside a branch are
left out, since a scale there is one of the kernels beside it. Nothing is estimated in the branches, so a start that
computes what the conv computed does so in train mode, too:

- takeover: F₀ is the conv's own kernel, s₀ = 1, the other kernels are random and their scales are 0;
- split: the other kernels are random as well, their scales are 1, and F₀ is smaller by what they add;
- scratch: all kernels are random, and the scales are what the paper's code starts with.

Hu et al. 2022, Online Convolutional Re-parameterization, arXiv:2204.00826, section 3. Its start is in the published
code only (github.com/JUGGHM/OREPA_CVPR2022): kernels uniform on ±√(6/fan_in); scales of 0.25 for the k×k kernel, 1 for
the 1×1 kernel, 0.5 for a 1×1 and k×k in a row, and 0.25 for a 1×1 and an average. It has no strips: here they start as
the k×k kernel does; and no identity inside the kernel: here that starts with 1, as the 1×1 kernel does.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from surgeon.blocks import base
from surgeon.blocks.anatomy import BranchKernel
from surgeon.conv import kernels
from surgeon.conv.scaled_sum import Window, added_up, identity_of, scaled_sum
from surgeon.conv.spec import ConvSpec, is_channels_last

Opts = TypeVar("Opts", bound=base.BlockOptions, default=Any)
Shape = tuple[int, ...]


class Online(base.Foldable[Opts], Generic[Opts]):
    """A conv whose kernel is a sum of scaled kernels: (n, c_in, h, w) → (n, c_out, h', w').

    `conv_weight` and `bias` are those of the conv; `scale` has a row for `conv_weight`, and one for each part.
    It has no `weight`: whoever takes it for a conv and reads that would read one summand, and not the kernel.
    """

    DERIVED = frozenset({"windows", "pads_first", "how"})
    summand_names: ClassVar[tuple[str, ...]] = ()  # what tables call the parts, for as many as there can be
    starts: ClassVar[tuple[float, ...]]  # the scales of `init: scratch`, for as many parts as there can be

    def __init__(self, spec: ConvSpec, *, like: Tensor, **layout: Any) -> None:
        """Lay out the kernels, uninitialised, with tensors like `like`."""
        nn.Module.__init__(self)
        self.spec = spec
        vars(self).update(self.laid_out(spec, **layout))
        self.derive_()
        conv = spec.inner.build(like=like)
        self.conv_weight, self.bias = conv.weight, conv.bias
        order = torch.channels_last if is_channels_last(like) else torch.contiguous_format
        for name, shape in self.shapes().items():
            setattr(self, name, nn.Parameter(conv.weight.new_empty(shape).to(memory_format=order)))
        self.scale = nn.Parameter(conv.weight.new_empty(1 + len(self.windows), spec.c_out))

    @classmethod
    def laid_out(cls, spec: ConvSpec) -> dict[str, Any]:
        """Give the attributes that say, besides the spec, which parts there are, from what a recipe says of it."""
        return {}

    @abc.abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Name the kernels beside `conv_weight` that are trained, each with its shape."""

    @abc.abstractmethod
    def summands(self) -> list[Tensor | None]:
        """Give the parts of the kernel as they are now; None is the identity."""

    @abc.abstractmethod
    def places(self) -> list[Window]:
        """Say where in the kernel each part lies."""

    def derive_(self) -> None:
        """Find where the parts lie, and how torch's own conv is called."""
        self.windows = self.places()
        self.pads_first = None if self.spec.pads_input is None else self.spec
        pads = self.spec.pads
        self.how = (self.spec.stride, (pads.top, pads.left), self.spec.dilation, self.spec.groups)

    @classmethod
    def start(cls, conv: nn.Conv2d, options: Any, layout: dict[str, Any], generator: torch.Generator) -> Self:
        """Make the block of a conv; `options` say how it starts."""
        block = cls(ConvSpec.of(conv), like=conv.weight, **layout)
        with torch.no_grad():
            if options.init == "scratch":
                block._start_from_scratch_(options.gamma, generator)
            elif options.init == "split":
                block._split_kernels_(conv.weight, generator)
            else:
                block._draw_parts_(1.0, generator)
                block.conv_weight = conv.weight
                block.scale.zero_()[0] = 1
        if conv.bias is not None and options.init != "scratch":
            block.bias = conv.bias
        trained = {name: conv.weight.requires_grad for name, _ in block.named_parameters()}
        if conv.bias is not None:
            trained["bias"] = conv.bias.requires_grad
        for name, is_trained in trained.items():
            block.get_parameter(name).requires_grad_(is_trained)
        return block.train(conv.training)

    def kernel(self) -> Tensor:
        """Sum the kernels as they are now: (out, in/groups, kh, kw)."""
        return scaled_sum(self.scale, self.conv_weight, self.summands(), self.windows)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            stride, padding, dilation, groups = self.how
            kernel = added_up(self.scale, self.conv_weight, self.summands(), self.windows)
            return F.conv2d(input, kernel, self.bias, stride, padding, dilation, groups)
        return kernels.convolve(input, self.kernel(), self.bias, self.spec)

    def __prepare_scriptable__(self) -> Self:
        if self.spec.padding_mode != "zeros" or self.pads_first is not None or not self.spec.pads.is_symmetric:
            raise base.unscriptable(self, " that pads its input first, unless it is fused first")
        return self

    def fold(self) -> nn.Conv2d:
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.double()
            conv = self.spec.build_with(self._in_double().kernel(), bias, like=self.conv_weight)
        conv.requires_grad_(self.conv_weight.requires_grad)
        if conv.bias is not None and self.bias is not None:
            conv.bias.requires_grad_(self.bias.requires_grad)
        return conv.train(self.training)

    def fold_keeping_norm(self) -> None:
        return None

    def branch_kernels(self) -> Sequence[BranchKernel]:
        with torch.no_grad():
            own = self._in_double()
            names = ("conv_weight", *self.summand_names, *(f"part {i}" for i in range(len(self.windows))))
            made = []
            for i, gamma in enumerate(own.scale):
                alone = torch.zeros_like(own.scale)
                alone[i] = gamma
                kernel = scaled_sum(alone, own.conv_weight, own.summands(), own.windows)
                made.append(BranchKernel(names[i], kernel, gamma))
        return made

    def draw_anew_(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self._start_from_scratch_(None, generator)

    def unfoldable(self) -> str | None:
        wanted: dict[str, Shape] = {
            "conv_weight": self.spec.weight_shape,
            "scale": (1 + len(self.windows), self.spec.c_out),
        }
        for name, shape in (wanted | self.shapes()).items():
            tensor = getattr(self, name, None)
            if not isinstance(tensor, Tensor):
                return f"{name} is not there"
            if tensor.shape != shape:
                return f"{name} has the shape {tuple(tensor.shape)}, and {shape} belongs there"
        return None

    def role(self) -> base.Role:
        return super().role() | {"form": "online"}

    def extra_repr(self) -> str:
        said = [f"{name}={value}" for name, value in self.role().items() if name != "form"]
        return ", ".join((str(self.spec), *said))

    def _in_double(self) -> Self:
        """Give the same block with tensors of float64, which are no parameters."""
        made = nn.Module.__new__(type(self))
        vars(made).update(vars(self))
        tensors = {name: None if one is None else one.detach().double() for name, one in self._parameters.items()}
        vars(made)["_parameters"] = tensors
        return made

    def _draw_parts_(self, factor: float, generator: torch.Generator) -> None:
        """Draw the kernels beside `conv_weight`, uniform on ±factor/√fan_in."""
        for name, shape in self.shapes().items():
            self.get_parameter(name).copy_(factor * base.kaiming_uniform(shape, generator, like=self.conv_weight))

    def _start_from_scratch_(self, gamma: float | None, generator: torch.Generator) -> None:
        """Start as the published code does; a `gamma` takes the place of its scales."""
        factor, shape = math.sqrt(6.0), self.spec.weight_shape
        self.conv_weight.copy_(factor * base.kaiming_uniform(shape, generator, like=self.conv_weight))
        self._draw_parts_(factor, generator)
        for row, start in zip(self.scale, self.starts, strict=False):
            row.fill_(start if gamma is None else gamma)
        if self.bias is not None:
            self.bias.zero_()

    def _split_kernels_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw the parts, each as large as the kernel's own taps, and subtract them; all is rounded last."""
        size = weight.double().square().mean().sqrt()
        for name, own in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(own.double()))
        self._draw_parts_(1.0, generator)
        self.scale.fill_(1)
        for row, part in zip(self.scale[1:], self.summands(), strict=True):
            taps = identity_of(self.conv_weight) if part is None else part
            row.mul_(size * (taps.count_nonzero() / taps.square().sum()).sqrt())
        self.conv_weight.zero_()
        self.conv_weight.copy_(weight.double() - self.kernel())
        for name, own in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(own.to(weight.dtype)))
