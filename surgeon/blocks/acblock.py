"""ACBlock: a k×k, a k×1 and a 1×k convolution side by side, each with its own norm, summed.

    y = bn_s(F_s∗x) + bn_v(F_v∗x) + bn_h(F_h∗x)

Trained, it strengthens the middle row and column (the skeleton) of the kernel; folded, it is one k×k convolution:

    F = γ_s/σ_s·F_s + γ_v/σ_v·F_v (laid on column c) + γ_h/σ_h·F_h (laid on row r),   b = Σ β − μ·γ/σ

A strip that lies on row r of a kernel of height k sees what that row sees: its input is padded by p − r·d above and by
p − (k−1−r)·d below, where a negative number crops.

Ding et al. 2019, ACNet, arXiv:1908.03930, section 3 and eq. 4–6; placement `border` is its control experiment (4.4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from surgeon._torch_compat import BatchNorm
from surgeon.blocks import base, norms
from surgeon.blocks.base import Trial
from surgeon.conv import kernels
from surgeon.conv.spec import ConvSpec, Pads

Norm = TypeVar("Norm", bound=nn.Module)


class ACBlockOptions(base.BlockOptions):
    """How an ACBlock starts and where its strips lie."""

    init: Literal["takeover", "split", "scratch"] = Field(
        "takeover",
        description="takeover: the conv and its norm become the square branch, the strips start at gamma 0 (same "
        "function, in training too where a norm was taken over); split: random strips, which are subtracted from the "
        "square kernel (same function in eval mode); scratch: the paper's random start",
    )
    placement: Literal["skeleton", "border"] = Field(
        "skeleton", description="strips on the middle row and column, or on the last ones (the paper's control)"
    )
    gamma: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="scale of the three norms of `init: scratch`; 1 unless given, 1/3 keeps the variance of one branch",
    )

    @model_validator(mode="after")
    def _gamma_needs_scratch(self) -> Self:
        if self.gamma is not None and self.init != "scratch":
            raise ValueError(f"gamma is for init: scratch; init: {self.init} sets it from the model")
        return self


class ACBlock(base.Foldable[ACBlockOptions]):
    """Three parallel branches for one k×k conv: (n, c_in, h, w) → (n, c_out, h', w').

    Submodules are named as in the published code, so its checkpoints load.
    """

    __module__ = "surgeon.nn"

    name = "acblock"
    title = "k×k + k×1 + 1×k branches, each with a norm; folds back to one conv"
    paper = "Ding et al. 2019, ACNet, arXiv:1908.03930"
    Options = ACBlockOptions
    gives_norm_back = True
    pads_its_input = True
    DERIVED = frozenset({"row", "column", "ver_shift", "hor_shift", "pads_first"})

    def __init__(self, spec: ConvSpec, norm: nn.Module, *, like: Tensor, placement: str = "skeleton") -> None:
        """Lay out the branches with tensors like `like`, uninitialised kernels, and norms like `norm`."""
        super().__init__()
        self.spec = spec.change(bias=False)
        self.placement = placement
        self.derive_()
        (ver_spec, _), (hor_spec, _) = self._strips()
        self.square_conv = self.spec.inner.build(like=like)
        self.square_bn = norm  # of any class, and what it does in train mode is its own affair
        self.ver_conv = ver_spec.build(like=like)
        self.ver_bn = _fresh_norm(norm)
        self.hor_conv = hor_spec.build(like=like)
        self.hor_bn = _fresh_norm(norm)

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
    def keeps_function(cls, options: ACBlockOptions) -> bool:
        return options.init != "scratch"

    @classmethod
    def takes_norm(cls, options: ACBlockOptions) -> bool:
        return True

    @classmethod
    def note(cls, options: ACBlockOptions, norm_obstacle: str | None) -> str | None:
        if options.init == "scratch":
            return "starts at random: what the conv has learnt is lost"
        if norm_obstacle is not None:
            return f"same function in eval mode only: {norm_obstacle}"
        return "same function in eval mode only: each branch has its own norm" if options.init == "split" else None

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, options: ACBlockOptions, *, norm: nn.Module | None, generator: torch.Generator
    ) -> Self:
        own = _identity_norm(conv) if norm is None else _taken_over(norm, conv.bias)
        is_scratch = options.init == "scratch"
        square = _started_anew(own) if is_scratch else own
        block = cls(ConvSpec.of(conv), square, like=conv.weight, placement=options.placement)
        with torch.no_grad():
            if is_scratch:
                block._start_from_scratch_(options.gamma or 1.0, generator)
            elif options.init == "split":
                block._split_(conv.weight, generator)
            else:
                block._take_over_(conv.weight, generator)
        block._follow_(conv, own)
        return block

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

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.pads_first is None else self.pads_first.padded(input)
        ver = hor = x
        if self.ver_shift is not None:
            ver = kernels.shift(x, self.ver_shift, self.spec.padding_mode)
        if self.hor_shift is not None:
            hor = kernels.shift(x, self.hor_shift, self.spec.padding_mode)
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

    def fold(self) -> nn.Conv2d:
        with torch.no_grad():
            folded = [kernels.fold_bn(kernel, None, norm) for kernel, norm in self._laid_out()]
            kernel, bias = kernels.add(*folded)
        conv = self.spec.build_with(kernel, bias, like=self.square_conv.weight)
        conv.requires_grad_(self.square_conv.weight.requires_grad)
        return conv.train(self.training)

    def fold_keeping_norm(self) -> tuple[nn.Conv2d, nn.Module]:
        own = self.square_bn
        with torch.no_grad():
            kernel, numbers = kernels.keep_bn(
                self._laid_out(), scales=own.weight is not None, shifts=own.bias is not None
            )
            conv = self.spec.build_with(kernel, None, like=self.square_conv.weight)
            norm = _copied(own)
            numbers.write_(norm)
        conv.requires_grad_(self.square_conv.weight.requires_grad)
        return conv.train(self.training), norm

    def _laid_out(self) -> list[tuple[Tensor, kernels.Norm]]:
        """Give the kernel of each branch, as large as the square one, and its norm, in float64."""
        places: tuple[dict[str, int], ...] = ({}, {"column": self.column}, {"row": self.row})
        return [
            (kernels.embed(conv.weight.double(), self.spec.kernel, **place), kernels.Norm.behind(conv, norm))
            for (conv, norm), place in zip(self._branches(), places, strict=True)
        ]

    def unfoldable(self) -> str | None:
        for name in ("square_bn", "ver_bn", "hor_bn"):
            norm = getattr(self, name)
            if not norms.is_batch_norm(norm) or norms.rest_of(norm):
                return f"{name} is a {type(norm).__name__} now"
            if norm.running_mean is None or norm.running_var is None:
                return f"{name} keeps no running statistics"
        (ver_spec, _), (hor_spec, _) = self._strips()
        for name, spec in (("square_conv", self.spec.inner), ("ver_conv", ver_spec), ("hor_conv", hor_spec)):
            conv = getattr(self, name)
            if not isinstance(conv, nn.Conv2d) or ConvSpec.of(conv).change(bias=False) != spec:
                return f"{name} is not the conv that belongs there: {spec}"
        return None

    def extra_repr(self) -> str:
        return f"{self.spec}, placement={self.placement}"

    def _start_from_scratch_(self, gamma: float, generator: torch.Generator) -> None:
        for conv, norm in self._branches():
            conv.weight.copy_(base.kaiming_uniform(tuple(conv.weight.shape), generator, like=conv.weight))
            assert isinstance(norm, BatchNorm)  # all three are new
            norm.weight.fill_(gamma)

    def _take_over_(self, weight: Tensor, generator: torch.Generator) -> None:
        assert isinstance(weight, nn.Parameter)
        self.square_conv.weight = weight
        for conv, norm in self._strip_branches():
            conv.weight.copy_(base.kaiming_uniform(tuple(conv.weight.shape), generator, like=conv.weight))
            norm.weight.zero_()

    def _split_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw the strips as large as the kernel's own taps, and subtract them from the square kernel."""
        size, kernel = self.spec.kernel, weight.double()
        places, square = ({"column": self.column}, {"row": self.row}), kernels.Norm.of(self.square_bn)
        for (conv, norm), place in zip(self._strip_branches(), places, strict=True):
            noise = base.normal(tuple(conv.weight.shape), generator, like=weight)
            strip = noise * weight.double().square().mean().sqrt()
            conv.weight.copy_(strip)
            kernel = kernel - kernels.embed(strip, size, **place)
            assert norm.running_var is not None
            norm.running_var.copy_(square.var)  # the same scale as the square branch, and no shift
            norm.weight.copy_(square.weight)
        self.square_conv.weight.copy_(kernel)

    def _follow_(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        """Take over what the conv and its norm train, and the mode that they are in."""
        for module in (self.square_conv, self.ver_conv, self.hor_conv, self.ver_bn, self.hor_bn):
            module.requires_grad_(conv.weight.requires_grad)
        if self.square_bn is not norm:
            self.square_bn.requires_grad_(conv.weight.requires_grad)
        mode = norm.training  # read first: the norm may be the square branch's own, and a frozen one stays in eval mode
        self.train(conv.training)
        for _, branch_norm in self._branches():
            branch_norm.train(mode)

    def _branches(self) -> tuple[tuple[nn.Conv2d, nn.Module], ...]:
        return ((self.square_conv, self.square_bn), *self._strip_branches())

    def _strip_branches(self) -> tuple[tuple[nn.Conv2d, BatchNorm], ...]:
        return ((self.ver_conv, self.ver_bn), (self.hor_conv, self.hor_bn))


def _fresh_norm(norm: nn.Module) -> BatchNorm:
    """Make an affine norm with statistics 0 and 1 that is trained, whatever class the other is of."""
    var = kernels.Norm.of(norm).var
    options: dict[str, Any] = {"device": var.device, "dtype": var.dtype}
    options |= {name: vars(norm)[name] for name in ("eps", "momentum") if name in vars(norm)}
    if isinstance(norm, nn.SyncBatchNorm):
        return nn.SyncBatchNorm(len(var), process_group=norm.process_group, **options)
    return nn.BatchNorm2d(len(var), **options)


def _started_anew(norm: nn.Module) -> nn.Module:
    """Make a norm like another one, with statistics 0 and 1; one that is not trained becomes one that is."""
    if not isinstance(norm, BatchNorm) or norm.weight is None:
        return _fresh_norm(norm)
    made = _copied(norm)
    made.reset_running_stats()
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def _identity_norm(conv: nn.Conv2d) -> BatchNorm:
    """Make a norm that does nothing in eval mode but add the conv's bias."""
    norm = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
    with torch.no_grad():
        norm.weight.fill_((1 + norm.eps) ** 0.5)
    norm.weight.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        norm.bias = nn.Parameter(conv.bias) if not isinstance(conv.bias, nn.Parameter) else conv.bias
    else:
        norm.bias.requires_grad_(conv.weight.requires_grad)
    return norm.train(conv.training)


def _taken_over(norm: nn.Module, bias: Tensor | None) -> nn.Module:
    """Copy a norm, sharing its parameters; the bias of the conv before it moves into the running mean."""
    made = _copied(norm, shared=[*norm.parameters()])
    if bias is not None:
        mean = made.running_mean
        assert isinstance(mean, Tensor)
        with torch.no_grad():
            mean.copy_(mean.double() - bias.double())
    return made


def _copied(norm: Norm, shared: Sequence[object] = ()) -> Norm:
    """Copy a norm; what is `shared` stays the same object in both."""
    connection = [norm.process_group] if isinstance(norm, nn.SyncBatchNorm) else []  # to other processes; has no copy
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in norm.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in norm.buffers()}
    return copy.deepcopy(norm, memo=memo | {id(value): value for value in (*shared, *connection)})
