"""OctaveConv: a convolution whose channels come in two streams, the low one at half the resolution.

Which channels are low is said by ranges (`conv/streams`, where split, join, pool and up are). On plain tensors

    y = join(high, low) of split(x) = (h, l)
    high = W_hh ∗ h + up(W_lh ∗ l)
    low  = W_hl ∗ pool(h) + W_ll ∗ l

and on a pair (h, l) it gives the pair (high, low), as in a graph from which joins and splits have been taken out. The
four kernels are parts of one kernel of the shape that the conv had, so the octave model has the keys and shapes of the
model it comes from. With α_in = 0 or α_out = 0 (the first and the last conv of a region) there is no low stream there.
At stride 2 the maps are pooled and then convolved at stride 1:

    paper      h ← pool(h), and l is not pooled on its way to high: it has that resolution already
    pool-both  h ← pool(h), l ← pool(l)

A conv that pads as TensorFlow's SAME does then pads both sides alike, since at stride 1 SAME is that.

A filter of a grouped conv sees the channels of its group only: each path takes the groups that lead from its stream to
the other, so a depthwise conv has h → h and l → l alone.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, section 3 and eq. 2–5.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.base import PLAIN, Trial
from surgeon.blocks.fittable import Fittable, Path, View
from surgeon.blocks.fused_octave import FusedOctave
from surgeon.blocks.stacked_octave import StackedOctave
from surgeon.blocks.two_streams import Streams, TwoStreamBlock, TwoStreamOptions, in_words
from surgeon.conv import kernels, streams
from surgeon.conv.spec import ConvSpec
from surgeon.conv.streams import Ranges


class OctaveConvOptions(TwoStreamOptions):
    """What share of the channels is low, before and behind the conv."""


class OctaveConv(Fittable[OctaveConvOptions], TwoStreamBlock[OctaveConvOptions]):
    """Two streams in place of a conv, joined again: (n, c_in, h, w) → (n, c_out, h', w'). Approximates it, by design.

    `weight` and `bias` are those of the conv.
    """

    __module__ = "surgeon.nn"

    name = "octave"
    title = "high and low frequency channels, the low ones at half the resolution"
    paper = "Chen et al. 2019, Drop an Octave, arXiv:1904.05049"
    Options = OctaveConvOptions
    deployed_so_since = 3
    pads_its_input = True

    def __init__(self, conv: nn.Conv2d, options: OctaveConvOptions) -> None:
        """Take over the parameters of a conv that is not refused."""
        super().__init__()
        self.spec, self.downsample = ConvSpec.of(conv), options.downsample
        self.low_in, self.low_out = options.ranges(self.spec)
        self.keeps_seams = options.seams == "keep"
        self.weight, self.bias = conv.weight, conv.bias

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: OctaveConvOptions) -> str | None:
        if spec.stride not in ((1, 1), (2, 2)):
            return f"stride {spec.stride[0]}x{spec.stride[1]}: only 1 and 2 are defined for two streams"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {spec.kernel[0]}x{spec.kernel[1]} has no centre: {even[0]} is even"
        if isinstance(spec.pads_input, tuple):
            return (
                "its padding is not the same on both sides, and would shift the low stream twice as far as the high one"
            )
        growth = [spec.pads[0] + spec.pads[1], spec.pads[2] + spec.pads[3]]
        if growth != [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]:
            return "its padding does not keep the size of the map, so the two streams would drift apart"
        for which, alpha, count in zip(("input", "output"), options.alphas, (spec.c_in, spec.c_out), strict=True):
            if alpha and not math.floor(alpha * count) and not (which == "input" and options.low_in is not None):
                return f"alpha {alpha:g} of {count} {which} channels leaves none for the low stream"
        if options.low_in and (options.low_in[-1][1] > spec.c_in or streams.count(options.low_in) == spec.c_in):
            return f"low_in must lie within {spec.c_in} input channels and leave some of them high"
        if spec.groups > 1 and (cut := _cut_group(spec, options)):
            return cut
        if size is not None and spec.padding_mode in ("reflect", "circular"):
            return _too_small(spec, size)
        return None

    @classmethod
    def keeps_function(cls, options: OctaveConvOptions) -> bool:
        return False

    @classmethod
    def settings(cls, options: OctaveConvOptions) -> list[OctaveConvOptions]:
        shares = sorted({*(i / 16 for i in range(1, 13)), options.alpha} - {0.0})
        return [options.model_copy(update={"alpha": alpha}) for alpha in shares]

    @classmethod
    def note(cls, options: OctaveConvOptions, norm_obstacle: str | None) -> str | None:
        before, behind = options.alphas
        if not (before or behind):
            return "pooled, then convolved at stride 1"
        where = f" (low: {in_words(options.low_in)})" if options.low_in else ""
        return f"low share {before:.3g}{where} → {behind:.3g}"

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, options: OctaveConvOptions, *, norm: nn.Module | None, generator: torch.Generator
    ) -> Self:
        return cls(conv, options).train(conv.training)

    @classmethod
    def trials(cls) -> Iterator[Trial]:
        specs = [
            ConvSpec(8, 12, (3, 3), padding=(1, 1)),
            ConvSpec(8, 4, (1, 1), stride=(2, 2), bias=False),
            ConvSpec(8, 8, (3, 5), padding="same", dilation=(2, 1), padding_mode="replicate"),
            ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 2), groups=8),
        ]
        for spec in specs:
            for options in ({"alpha": 0.5}, {"alpha_in": 0.0}, {"alpha_out": 0.0}, {"downsample": "pool-both"}):
                yield Trial(spec, OctaveConvOptions.model_validate(options))
        yield Trial(specs[0], OctaveConvOptions.model_validate({"low_in": ((1, 3), (5, 6))}))

    def core(self, high: Tensor, low: Tensor | None) -> Streams:
        if self.spec.groups > 1:
            return self._grouped(high, low)
        high, fine, low, needs_up = self.resampled(high, low)
        to_high, to_low = streams.part(streams.cast_once(self.weight, high), self.low_out, 0)
        bias_high, bias_low = (None, None) if self.bias is None else streams.part(self.bias, self.low_out, 0)
        from_high, from_low = streams.part(to_high, self.low_in)
        made = self._run(high, from_high, bias_high)
        if fine is not None and from_low is not None:
            extra = self._run(fine, from_low, None)
            made = streams.add_up(made, extra) if needs_up else made + extra
        if to_low is None:
            return made, None
        pooled = streams.pool(high)
        if low is None:
            return made, self._run(pooled, to_low, bias_low)
        if self.low_in[-1][1] != self.spec.c_in or len(self.low_in) > 1:
            to_low = streams.take(to_low, (*streams.others(self.low_in, self.spec.c_in), *self.low_in))
        return made, self._run(torch.cat([pooled, low], 1), to_low, bias_low)

    def views(self, input: Tensor | Streams) -> tuple[View, ...]:
        """Say what its filters see: h, pooled h, l and enlarged l; those of a conv with groups path by path."""
        if isinstance(input, Tensor):
            input = streams.split(input, self.low_in) if self.low_in else (input, None)
        high, fine, low, needs_up = self.resampled(*input)
        if self.spec.groups > 1:
            return tuple(self._grouped_views(high, fine, low, needs_up))
        from_high = streams.others(self.low_in, self.spec.c_in)
        to_high, to_low = [self._seen(high, from_high)], [self._seen(streams.pool(high), from_high)]
        if fine is not None and low is not None:
            to_high.append(self._seen(fine, self.low_in, is_up=needs_up))
            to_low.append(self._seen(low, self.low_in))
        views = [View("high", streams.others(self.low_out, self.spec.c_out), tuple(to_high))]
        return (*views, *[View("low", self.low_out, tuple(to_low), is_low=True)] * bool(self.low_out))

    def take_kernel_(self, kernel: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            self.weight.copy_(kernel)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def with_norm(self, norm: nn.Module) -> Self:
        """Fold a norm into all four kernels at once: each of its channels belongs to one stream."""
        made = copy.deepcopy(self)
        weight, bias = kernels.with_norm(self.weight, self.bias, norm)
        made.spec, made.weight, made.bias = self.spec.change(bias=True), nn.Parameter(weight), nn.Parameter(bias)
        return made

    def branch_kernels(self) -> list[BranchKernel]:
        return self.by_path(self.weight)

    def deploy(self) -> nn.Module:
        """Return the same function in plain convs; of a conv with groups, a copy of the block."""
        if self.spec.groups == 1:
            return FusedOctave(self)
        return copy.deepcopy(self)

    def form_on(self, device: str) -> str:
        return StackedOctave.form if device == "cuda" and StackedOctave.form in self.forms() else PLAIN

    def forms(self) -> Mapping[str, Callable[[], nn.Module]]:
        plain: dict[str, Callable[[], nn.Module]] = {PLAIN: self.deploy}
        has_streams = self.spec.groups == 1 and bool(self.low_in or self.low_out)
        return plain | ({StackedOctave.form: partial(StackedOctave, self)} if has_streams else {})

    def kernel(self, filters: Ranges, channels: Ranges) -> Tensor:
        """Cut the kernel of one path, or of several side by side, out of the conv's own."""
        return streams.take(streams.take(self.weight, filters, 0), streams.merged(channels))

    def _seen(self, x: Tensor, channels: Ranges, *, is_up: bool = False) -> Path:
        return Path(x, self.spec.at_stride_1.change(c_in=x.shape[1], bias=False), channels, is_up)

    def _grouped_views(self, high: Tensor, fine: Tensor | None, low: Tensor | None, needs_up: bool) -> Iterator[View]:
        channels = ((0, self.spec.c_in // self.spec.groups),)
        for to_low in (False, True):
            maps = {False: streams.pool(high) if to_low else high, True: low if to_low else fine}
            for path in self._paths(to_low=to_low):
                source = maps[path.reads_low]
                assert source is not None
                is_up = path.reads_low and needs_up and not to_low
                seen = Path(source[:, path.channels], path.spec, channels, is_up)
                filters = ((path.rows.start, path.rows.stop),)
                yield View(
                    f"{'low' if path.reads_low else 'high'} to {'low' if to_low else 'high'}", filters, (seen,), to_low
                )

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        spec = self.spec.at_stride_1.change(c_in=weight.shape[1], c_out=weight.shape[0])
        return kernels.convolve(x, weight, bias, spec)

    def _grouped(self, high: Tensor, low: Tensor | None) -> Streams:
        """Convolve group by group: what each stream gets from the other comes behind or before its own channels."""
        high, fine, low, needs_up = self.resampled(high, low)
        weight: Tensor = streams.cast_once(self.weight, high)
        highs, lows = [], []
        for path in self._paths(to_low=False):
            source = fine if path.reads_low else high
            assert source is not None
            made = self._convolved(path, source, weight)
            highs.append(streams.up(made, high.shape[-2:]) if path.reads_low and needs_up else made)
        for path in self._paths(to_low=True):
            source = low if path.reads_low else streams.pool(high)
            assert source is not None
            lows.append(self._convolved(path, source, weight))
        return self._stream(highs, to_low=False), self._stream(lows, to_low=True) if lows else None

    def _stream(self, made: list[Tensor], *, to_low: bool) -> Tensor:
        """Put together what the paths to one stream give, and add its part of the bias."""
        stream = made[0] if len(made) == 1 else torch.cat(made, 1)
        if self.bias is None:
            return stream
        border = self.spec.c_out - streams.count(self.low_out)
        return stream + (self.bias[border:] if to_low else self.bias[:border])[:, None, None]

    def _convolved(self, path: _Path, x: Tensor, weight: Tensor) -> Tensor:
        return kernels.convolve(x[:, path.channels], weight[path.rows], None, path.spec)

    def _paths(self, *, to_low: bool) -> Iterator[_Path]:
        """Give the paths to one stream of a grouped conv, that from the high one first."""
        spec = self.spec
        high_in, high_out = spec.c_in - streams.count(self.low_in), spec.c_out - streams.count(self.low_out)
        filters = range(high_out, spec.c_out) if to_low else range(high_out)
        per_in, per_out = spec.c_in // spec.groups, spec.c_out // spec.groups
        for reads_low, channels in ((False, range(high_in)), (True, range(high_in, spec.c_in))):
            first = max(channels.start // per_in, filters.start // per_out)
            last = min(channels.stop // per_in, filters.stop // per_out)
            if first < last:
                start = high_in if reads_low else 0
                yield _Path(
                    reads_low,
                    slice(first * per_in - start, last * per_in - start),
                    slice(first * per_out, last * per_out),
                    spec.at_stride_1.change(
                        c_in=(last - first) * per_in,
                        c_out=(last - first) * per_out,
                        groups=last - first,
                        bias=False,
                    ),
                )


@dataclass(frozen=True, slots=True)
class _Path:
    """A kernel of a grouped conv that leads from one stream to one: what it reads, and where its filters are."""

    reads_low: bool
    channels: slice  # of the stream that it reads
    rows: slice  # of the kernel: its filters
    spec: ConvSpec


def _cut_group(spec: ConvSpec, options: OctaveConvOptions) -> str | None:
    """Say which α would cut through a group, or that the low channels of a grouped conv are not the last."""
    if options.low_in and (len(options.low_in) > 1 or options.low_in[0][1] != spec.c_in):
        return "it reads a concatenation whose low channels are not all at the end, and its groups cannot follow that"
    lows = (streams.count(ranges) for ranges in options.ranges(spec))
    for which, count, low in zip(("input", "output"), (spec.c_in, spec.c_out), lows, strict=True):
        per_group = count // spec.groups
        if rest := low % per_group:
            return f"{low} low channels cut a group of {per_group} {which} channels into {per_group - rest} and {rest}"
    return None


def _too_small(spec: ConvSpec, size: tuple[int, int]) -> str | None:
    """Say where a map at half (or a quarter) of the resolution has no pixels to pad with."""
    halvings = 1 if spec.stride == (1, 1) else 2
    for side, before, after in zip(size, spec.pads[::2], spec.pads[1::2], strict=True):
        least = math.ceil(side / 2**halvings)
        if max(before, after) >= least + (spec.padding_mode == "circular"):
            return f"padding {max(before, after)} in mode {spec.padding_mode} is too wide for a low map of {least}"
    return None
