"""OctaveConv: a convolution whose channels come in two streams, the low one at half the resolution.

Of C channels the first C − ⌊αC⌋ are high and the rest are low. On plain tensors, with pool 2×2 average pooling and up
nearest-neighbour ×2, cropped to the size of the high stream:

    split(x) = (x_high, pool(x_low)),   join(h, l) = cat(h, up(l)),   split(join(h, l)) = (h, l)

    y = join(high, low) of split(x) = (h, l)
    high = W_hh ∗ h + up(W_lh ∗ l)
    low  = W_hl ∗ pool(h) + W_ll ∗ l

The four kernels are parts of one kernel of the shape that the conv had, so the octave model has the keys and shapes of
the model it comes from. With α_in = 0 or α_out = 0 (the first and the last conv of a region) there is no low stream
there. At stride 2 the maps are pooled and then convolved at stride 1:

    paper      h ← pool(h), and l stays where it makes high: it has that resolution already
    pool-both  h ← pool(h), l ← pool(l)

A filter of a grouped conv sees the channels of its group only: each path takes the groups that lead from its stream to
the other, so a depthwise conv has h → h and l → l alone.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgeon import kernels
from surgeon.blocks import base
from surgeon.blocks.base import Example
from surgeon.spec import ConvSpec


class OctaveConvOptions(base.BlockOptions):
    """What share of the channels is low, before and behind the conv."""

    alpha: float = Field(
        0.5, ge=0, lt=1, description="share of low channels, before and behind the conv unless they are given apart"
    )
    alpha_in: float | None = Field(
        None, ge=0, lt=1, description="share before the conv; 0 for the first conv of a region"
    )
    alpha_out: float | None = Field(
        None, ge=0, lt=1, description="share behind the conv; 0 for the last conv of a region"
    )
    downsample: Literal["paper", "pool-both"] = Field(
        "paper",
        description="at stride 2, paper: the low stream makes the high one as it is; pool-both: both streams are "
        "pooled first, as a second lineage of code does",
    )

    @model_validator(mode="after")
    def _something_is_low(self) -> Self:
        if not any(self.alphas):
            raise ValueError("alpha is 0 before and behind the conv: nothing would be low")
        return self

    @property
    def alphas(self) -> tuple[float, float]:
        """The shares before and behind the conv."""
        before, behind = self.alpha_in, self.alpha_out
        return self.alpha if before is None else before, self.alpha if behind is None else behind


@dataclass(frozen=True, slots=True)
class _Path:
    """One of the four kernels: what it reads, and where it lies in the conv's own kernel."""

    reads_low: bool
    channels: slice  # of the stream that it reads
    rows: slice  # of the kernel: its filters
    columns: slice  # of the kernel: the channels within a group
    spec: ConvSpec


class OctaveConv(base.Block):
    """Two streams in place of a conv, joined again: (n, c_in, h, w) → (n, c_out, h', w'). Approximates it, by design.

    `weight` and `bias` are those of the conv.
    """

    name = "octave"
    title = "high and low frequency channels, the low ones at half the resolution"
    paper = "Chen et al. 2019, Drop an Octave, arXiv:1904.05049"
    Options = OctaveConvOptions

    def __init__(self, conv: nn.Conv2d, options: OctaveConvOptions) -> None:
        """Take over the parameters of a conv that is not refused."""
        super().__init__()
        self.spec, self.downsample = ConvSpec.of(conv), options.downsample
        self.alpha_in, self.alpha_out = options.alphas
        self.weight, self.bias = conv.weight, conv.bias

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: base.BlockOptions) -> str | None:
        assert isinstance(options, OctaveConvOptions)
        if spec.stride not in ((1, 1), (2, 2)):
            return f"stride {spec.stride[0]}x{spec.stride[1]}: only 1 and 2 are defined for two streams"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {spec.kernel[0]}x{spec.kernel[1]} has no centre: {even[0]} is even"
        growth = [spec.pads[0] + spec.pads[1], spec.pads[2] + spec.pads[3]]
        if growth != [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]:
            return "its padding does not keep the size of the map, so the two streams would drift apart"
        for which, alpha, count in zip(("input", "output"), options.alphas, (spec.c_in, spec.c_out), strict=True):
            if alpha and not math.floor(alpha * count):
                return f"alpha {alpha:g} of {count} {which} channels leaves none for the low stream"
        if spec.groups > 1 and (cut := _cut_group(spec, options.alphas)):
            return cut
        if size is not None and spec.padding_mode in ("reflect", "circular"):
            return _too_small(spec, size)
        return None

    @classmethod
    def keeps_function(cls, options: base.BlockOptions) -> bool:
        return False

    @classmethod
    def note(cls, options: base.BlockOptions, norm_obstacle: str | None) -> str | None:
        return "approximates the conv: low channels lose their fine detail, and want training"

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, options: base.BlockOptions, *, norm: _BatchNorm | None, generator: torch.Generator
    ) -> Self:
        assert isinstance(options, OctaveConvOptions)
        return cls(conv, options).train(conv.training)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        specs = [
            ConvSpec(8, 12, (3, 3), padding=(1, 1)),
            ConvSpec(8, 4, (1, 1), stride=(2, 2), bias=False),
            ConvSpec(8, 8, (3, 5), padding="same", dilation=(2, 1), padding_mode="replicate"),
            ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 2), groups=8),
        ]
        for spec in specs:
            for options in ({"alpha": 0.5}, {"alpha_in": 0.0}, {"alpha_out": 0.0}, {"downsample": "pool-both"}):
                yield Example(spec, OctaveConvOptions.model_validate(options))

    def forward(self, input: Tensor) -> Tensor:
        low_in = _low(self.alpha_in, self.spec.c_in)
        high, low = input[:, : self.spec.c_in - low_in], input[:, self.spec.c_in - low_in :]
        return self._joined(*self.core(high, kernels.pool(low) if low_in else None))

    def core(self, high: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve the two streams: (n, high, h, w) and (n, low, ⌈h/2⌉, ⌈w/2⌉) or None, to the like."""
        is_strided = self.spec.stride == (2, 2)
        fine = low  # what makes the high stream
        if is_strided:
            high = kernels.pool(high)
            low = None if low is None else kernels.pool(low)
            fine = low if self.downsample == "pool-both" else fine
        needs_up = not is_strided or self.downsample == "pool-both"
        highs, lows = [], []
        for path in self._paths(to_low=False):
            source = fine if path.reads_low else high
            assert source is not None
            made = self._run(path, source)
            highs.append(kernels.up(made, high.shape[-2:]) if path.reads_low and needs_up else made)
        for path in self._paths(to_low=True):
            source = low if path.reads_low else kernels.pool(high)
            assert source is not None
            lows.append(self._run(path, source))
        return self._stream(highs, to_low=False), self._stream(lows, to_low=True) if lows else None

    def extra_repr(self) -> str:
        return f"{self.spec}, alpha={self.alpha_in:g}→{self.alpha_out:g}" + (
            f", downsample={self.downsample}" if self.spec.stride == (2, 2) else ""
        )

    def _joined(self, high: Tensor, low: Tensor | None) -> Tensor:
        return high if low is None else torch.cat([high, kernels.up(low, high.shape[-2:])], 1)

    def _stream(self, made: list[Tensor], *, to_low: bool) -> Tensor:
        """Put together what the paths to one stream give, and add its part of the bias."""
        stream = torch.cat(made, 1) if self.spec.groups > 1 else sum(made[1:], made[0])
        if self.bias is None:
            return stream
        border = self.spec.c_out - _low(self.alpha_out, self.spec.c_out)
        return stream + (self.bias[border:] if to_low else self.bias[:border])[:, None, None]

    def _run(self, path: _Path, x: Tensor) -> Tensor:
        return kernels.convolve(x[:, path.channels], self.weight[path.rows, path.columns], None, path.spec)

    def _paths(self, *, to_low: bool) -> Iterator[_Path]:
        """Give the paths to one stream, that from the high one first."""
        spec = self.spec
        low_in, low_out = _low(self.alpha_in, spec.c_in), _low(self.alpha_out, spec.c_out)
        high_in, high_out = spec.c_in - low_in, spec.c_out - low_out
        filters = range(high_out, spec.c_out) if to_low else range(high_out)
        for reads_low, channels in ((False, range(high_in)), (True, range(high_in, spec.c_in))):
            if spec.groups == 1:
                if channels and filters:
                    yield self._path(reads_low, channels, filters, high_in)
                continue
            per_in, per_out = spec.c_in // spec.groups, spec.c_out // spec.groups
            first = max(channels.start // per_in, filters.start // per_out)
            last = min(channels.stop // per_in, filters.stop // per_out)
            if first < last:
                groups_in = range(first * per_in, last * per_in)
                yield self._path(reads_low, groups_in, range(first * per_out, last * per_out), high_in)

    def _path(self, reads_low: bool, channels: range, filters: range, high_in: int) -> _Path:
        start = high_in if reads_low else 0
        spec, is_grouped = self.spec, self.spec.groups > 1
        part = spec.change(
            c_in=len(channels),
            c_out=len(filters),
            groups=len(channels) * spec.groups // spec.c_in if is_grouped else 1,
            stride=(1, 1),
            bias=False,
        )
        columns = slice(None) if is_grouped else slice(channels.start, channels.stop)
        return _Path(
            reads_low,
            slice(channels.start - start, channels.stop - start),
            slice(filters.start, filters.stop),
            columns,
            part,
        )


def _low(alpha: float, channels: int) -> int:
    """The number of low channels, ⌊αC⌋ as in the paper's code."""
    return math.floor(alpha * channels)


def _cut_group(spec: ConvSpec, alphas: tuple[float, float]) -> str | None:
    """Say which α would cut through a group."""
    for which, alpha, count in zip(("input", "output"), alphas, (spec.c_in, spec.c_out), strict=True):
        per_group = count // spec.groups
        if low := _low(alpha, count) % per_group:
            return f"alpha {alpha:g} cuts a group of {per_group} {which} channels into {per_group - low} and {low}"
    return None


def _too_small(spec: ConvSpec, size: tuple[int, int]) -> str | None:
    """Say where a map at half (or a quarter) of the resolution has no pixels to pad with."""
    halvings = 1 if spec.stride == (1, 1) else 2
    for side, before, after in zip(size, spec.pads[::2], spec.pads[1::2], strict=True):
        least = math.ceil(side / 2**halvings)
        if max(before, after) >= least + (spec.padding_mode == "circular"):
            return f"padding {max(before, after)} in mode {spec.padding_mode} is too wide for a low map of {least}"
    return None
