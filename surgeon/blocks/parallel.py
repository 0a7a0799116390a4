"""What blocks of parallel branches share: one branch is the conv that was replaced, and every branch ends with a norm.

    y = norm₀(F₀∗x) + norm₁(A₁(x)) + …,   A₁, A₂ … linear and the same at every pixel

Each branch is an affine convolution, so their sum is one (`conv.affine`), and folding is a few lines. They start in one
of three ways:

- takeover: the conv and its norm become the first branch, the scales of the other norms are 0: the same function, in
  train mode too where a norm was taken over;
- split: the other branches are random, with the scale of the first, and the kernel is smaller by what they add: the
  same function in eval mode, and a gradient everywhere from the first step;
- scratch: everything is random, as in the papers.

That is the form `branches`. The form `online` has the kernels of the branches, and no branches (`online`).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import TypeVar

from surgeon._torch_compat import BatchNorm
from surgeon.blocks import base, norms
from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.online import Online
from surgeon.conv import affine, kernels
from surgeon.conv.affine import Affine
from surgeon.conv.axis import Axis
from surgeon.conv.spec import ConvSpec, Pads

Norm = TypeVar("Norm", bound=nn.Module)


class ParallelOptions(base.BlockOptions):
    """How a block of parallel branches is computed, and how it starts."""

    form: Literal["branches", "online"] = Field(
        "branches",
        description="branches: each has its conv and its norm, and the norm behind the conv becomes one of them; "
        "online: their kernels, scaled filter by filter, are summed before one convolution at every step, and the norm "
        "stays where it is (OREPA: trains nearly as fast as the conv, and every start but scratch computes the same in "
        "training too)",
    )
    init: Literal["takeover", "split", "scratch"] = Field(
        "takeover",
        description="takeover: the conv and its norm become the first branch, the others start at gamma 0 (same "
        "function, in training too where a norm was taken over); split: the others are random, and are subtracted from "
        "the kernel (same function in eval mode); scratch: the paper's random start",
    )
    gamma: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="scale of the norms at the ends of the branches for `init: scratch`; 1 unless given, and 1/n for n "
        "branches keeps the variance of one branch; in the online form of all kernels, in place of the paper's scales",
    )

    @model_validator(mode="after")
    def _gamma_needs_scratch(self) -> Self:
        if self.gamma is not None and self.init != "scratch":
            raise ValueError(f"gamma is for init: scratch; init: {self.init} sets it from the model")
        return self


Opts = TypeVar("Opts", bound=ParallelOptions, default=Any)


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch: what is in front of its last norm, as an affine convolution, that norm, and its convs by name."""

    before: Affine
    norm: nn.Module
    convs: tuple[str, ...] = ()


class Parallel(base.Foldable[Opts], Generic[Opts]):
    """A block of parallel branches, each with a norm at its end; the first has the conv that was replaced."""

    gives_norm_back = True
    first_conv: ClassVar[str]  # the names of the first branch's conv and norm
    first_norm: ClassVar[str]

    @abc.abstractmethod
    def __init__(self, spec: ConvSpec, norm: nn.Module, *, like: Tensor, **options: Any) -> None:
        """Lay out the branches, with `norm` at the end of the first, uninitialised kernels, and norms like it."""

    @abc.abstractmethod
    def branches(self) -> Sequence[Branch]:
        """Give the branches as they are now, in float64, the first one first."""

    @abc.abstractmethod
    def parts(self) -> Iterator[tuple[str, ConvSpec | None]]:
        """Name the convs of the block, each with the spec that it has to have, and its norms, with None."""

    @classmethod
    def layout_of(cls, options: Opts) -> dict[str, Any]:
        """Give what `__init__` is told of the options."""
        return {}

    @classmethod
    @abc.abstractmethod
    def online(cls) -> type[Online]:
        """Give the class of its other form."""

    @classmethod
    def keeps_function(cls, options: Opts) -> bool:
        return options.init != "scratch"

    @classmethod
    def keeps_training(cls, options: Opts, *, with_norm: bool) -> bool:
        if options.form == "online":
            return options.init != "scratch"
        return options.init == "takeover" and with_norm

    @classmethod
    def takes_norm(cls, options: Opts) -> bool:
        return options.form == "branches"

    @classmethod
    def leaves_norm(cls, options: Opts) -> bool:
        return options.form == "online"

    @classmethod
    def note(cls, options: Opts, norm_obstacle: str | None) -> str | None:
        if options.init == "scratch":
            return "starts at random: what the conv has learnt is lost"
        if options.form == "online":
            return None
        if norm_obstacle is not None:
            return f"same function in eval mode only: {norm_obstacle}"
        return "same function in eval mode only: each branch has its own norm" if options.init == "split" else None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, options: Opts, *, norm: nn.Module | None, generator: torch.Generator) -> Self:
        if options.form == "online":
            made = cls.online().start(conv, options, cls.layout_of(options), generator)
            return cast(Self, made)  # it is a subclass
        own = identity_norm(conv) if norm is None else taken_over(norm, conv.bias)
        first = started_anew(own) if options.init == "scratch" else own
        block = cls(ConvSpec.of(conv), first, like=conv.weight, **cls.layout_of(options))
        with torch.no_grad():
            if options.init == "scratch":
                block._start_from_scratch_(options.gamma or 1.0, generator)
            elif options.init == "split":
                exact = (1 + own.eps) ** 0.5 if norm is None and isinstance(own.eps, float) else None
                block._split_branches_(conv.weight, generator, exact)
            else:
                block._take_over_(conv.weight, generator)
        block._follow_(conv, own)
        return block

    def fold(self) -> nn.Conv2d:
        with torch.no_grad():
            whole = affine.total([one.before.then(Affine.norm(kernels.Norm.of(one.norm))) for one in self.branches()])
            conv = self.spec.build_with(whole.kernel, whole.bias, like=self._first().weight)
        conv.requires_grad_(self._first().weight.requires_grad)
        return conv.train(self.training)

    def fold_keeping_norm(self) -> tuple[nn.Conv2d, nn.Module] | None:
        own, branches = self.get_submodule(self.first_norm), self.branches()
        with torch.no_grad():
            aligned = affine.aligned([one.before for one in branches], self.spec.groups)
            numbers = [kernels.Norm.of(one.norm).double() for one in branches]
            behind = [replace(one, mean=one.mean - part.bias) for one, part in zip(numbers, aligned, strict=True)]
            pairs = list(zip((one.kernel for one in aligned), behind, strict=True))
            kernel, made = kernels.keep_bn(pairs, scales=own.weight is not None, shifts=own.bias is not None)
            conv = self.spec.build_with(kernel, None, like=self._first().weight)
            norm = copied(own)
            made.write_(norm)
        conv.requires_grad_(self._first().weight.requires_grad)
        return conv.train(self.training), norm

    def branch_kernels(self) -> Sequence[BranchKernel]:
        branches, made = self.branches(), []
        names = {module: name for name, module in self.named_modules()}
        with torch.no_grad():
            aligned = affine.aligned([one.before for one in branches], self.spec.groups)
            for one, part in zip(branches, aligned, strict=True):
                name = (one.convs[-1] if one.convs else names[one.norm]).partition(".")[0]
                norm = kernels.Norm.of(one.norm).double()
                sigma = torch.sqrt(norm.var + norm.eps)
                kernel = part.kernel * (norm.weight / sigma)[:, None, None, None]
                made.append(BranchKernel(name, kernel, norm.weight, sigma))
        return made

    def draw_anew_(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for branch in self.branches():
                self._draw_(branch.convs, generator)
            for norm in (self.get_submodule(name) for name, spec in self.parts() if spec is None):
                var = kernels.Norm.of(norm).var
                one, zero = torch.ones_like(var), torch.zeros_like(var)
                kernels.Norm(zero, one, one, zero, 0.0).write_(norm)

    def unfoldable(self) -> str | None:
        for name, spec in self.parts():
            try:
                part = self.get_submodule(name)
            except AttributeError:
                return f"{name} is not there"
            if spec is not None:
                if not isinstance(part, nn.Conv2d) or ConvSpec.of(part).change(bias=False) != spec:
                    return f"{name} is not the conv that belongs there: {spec}"
            elif not norms.is_batch_norm(part) or norms.rest_of(part):
                return f"{name} is a {type(part).__name__} now"
            elif part.running_mean is None or part.running_var is None:
                return f"{name} keeps no running statistics"
        return None

    def _first(self) -> nn.Conv2d:  # no property: torch.jit.script compiles those
        return self._conv(self.first_conv)

    def _start_from_scratch_(self, gamma: float, generator: torch.Generator) -> None:
        for branch in self.branches():
            self._draw_(branch.convs, generator)
            assert isinstance(branch.norm, BatchNorm)  # all are new
            branch.norm.weight.fill_(gamma)

    def _take_over_(self, weight: Tensor, generator: torch.Generator) -> None:
        assert isinstance(weight, nn.Parameter)
        self._first().weight = weight
        for branch in self.branches()[1:]:
            self._draw_(branch.convs, generator)
            branch.norm.weight.zero_()  # type: ignore[operator] # a fresh norm has one

    def _split_branches_(self, weight: Tensor, generator: torch.Generator, exact: float | None) -> None:
        """Draw the other branches, the last conv of each as large as the kernel's own taps, and subtract them.

        `exact` is the scale of the first norm where that is one number, which its dtype may not hold.
        """
        own = kernels.Norm.of(self.get_submodule(self.first_norm))
        scales = own.weight.double() if exact is None else torch.full_like(own.weight, exact, dtype=torch.float64)
        size = weight.double().square().mean().sqrt()
        convs = [self._conv(name) for branch in self.branches()[1:] for name in branch.convs]
        for conv in convs:  # what is subtracted is what was drawn, before it is rounded
            conv.weight = nn.Parameter(conv.weight.double())
        for branch in self.branches()[1:]:
            self._draw_(branch.convs[:-1], generator)
            for conv in map(self._conv, branch.convs[-1:]):
                conv.weight.copy_(base.normal(tuple(conv.weight.shape), generator, like=weight) * size)
        branches, kernel = self.branches(), weight.double()
        parts = affine.aligned([one.before for one in branches], self.spec.groups)
        for branch, part in zip(branches[1:], parts[1:], strict=True):
            share = torch.ones_like(size)
            if not branch.convs:  # its taps are what they are, 1 say, so its norm makes them as large as the others
                share = size / part.kernel.abs().amax()
            norm: Any = branch.norm
            norm.running_var.copy_(own.var)  # the same scale as the first, and no shift
            norm.weight.copy_(scales * share)
            norm.running_mean.copy_(part.bias)  # what norms inside a branch add
            kernel = kernel - part.kernel * share
        self._first().weight.copy_(kernel)
        for conv in convs:
            conv.weight = nn.Parameter(conv.weight.to(weight.dtype))

    def _draw_(self, convs: Sequence[str], generator: torch.Generator) -> None:
        for conv in map(self._conv, convs):
            conv.weight.copy_(base.kaiming_uniform(tuple(conv.weight.shape), generator, like=conv.weight))

    def _conv(self, name: str) -> nn.Conv2d:
        conv = self.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        return conv

    def _follow_(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        """Take over what the conv and its norm train, and the mode that they are in."""
        own = self.get_submodule(self.first_norm)
        parts = [self.get_submodule(name) for name, _ in self.parts()]
        for module in parts:
            if module is not own or own is not norm:
                module.requires_grad_(conv.weight.requires_grad)
        mode = norm.training  # read first: the norm may be the first branch's own, and a frozen one stays in eval mode
        self.train(conv.training)
        for (_, spec), module in zip(self.parts(), parts, strict=True):
            if spec is None:
                module.train(mode)


def placed(conv: nn.Conv2d, pads: Pads | None, mode: str) -> Affine:
    """Read the conv of a branch that sees a map shifted by `pads`, where its own padding cannot do that."""
    found = Affine.of_conv(conv)
    if pads is None:
        return found
    (sh, sw), (dh, dw) = ConvSpec.of(conv).stride, ConvSpec.of(conv).dilation
    rows = Axis(conv.weight.shape[2], sh, dh, pads.top, pads.bottom)
    return replace(found, rows=rows, columns=Axis(conv.weight.shape[3], sw, dw, pads.left, pads.right), mode=mode)


def fresh_norm(norm: nn.Module, channels: int | None = None) -> BatchNorm:
    """Make an affine norm with statistics 0 and 1 that is trained, whatever class the other is of."""
    var = kernels.Norm.of(norm).var
    options: dict[str, Any] = {"device": var.device, "dtype": var.dtype}
    options |= {name: vars(norm)[name] for name in ("eps", "momentum") if name in vars(norm)}
    count = len(var) if channels is None else channels
    if isinstance(norm, nn.SyncBatchNorm):
        return nn.SyncBatchNorm(count, process_group=norm.process_group, **options)
    return nn.BatchNorm2d(count, **options)


def started_anew(norm: nn.Module) -> nn.Module:
    """Make a norm like another one, with statistics 0 and 1; one that is not trained becomes one that is."""
    if not isinstance(norm, BatchNorm) or norm.weight is None:
        return fresh_norm(norm)
    made = copied(norm)
    made.reset_running_stats()
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def identity_norm(conv: nn.Conv2d) -> BatchNorm:
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


def taken_over(norm: nn.Module, bias: Tensor | None) -> nn.Module:
    """Copy a norm, sharing its parameters; the bias of the conv before it moves into the running mean."""
    made = copied(norm, shared=[*norm.parameters()])
    if bias is not None:
        mean = made.running_mean
        assert isinstance(mean, Tensor)
        with torch.no_grad():
            mean.copy_(mean.double() - bias.double())
    return made


def copied(norm: Norm, shared: Sequence[object] = ()) -> Norm:
    """Copy a norm; what is `shared` stays the same object in both."""
    connection = [norm.process_group] if isinstance(norm, nn.SyncBatchNorm) else []  # to other processes; has no copy
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in norm.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in norm.buffers()}
    return copy.deepcopy(norm, memo=memo | {id(value): value for value in (*shared, *connection)})
