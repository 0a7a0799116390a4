"""Operators that read and write a feature map in two streams, some of its channels at half the resolution.

`TwoStreams` is any such operator; `TwoStreamBlock` is a block that is one, and all that planning and rewriting graphs
(`octave/`) know of it. The streams of every block that subclasses it, wherever it comes from, are led from conv to
conv. The arithmetic of such a conv is in its own file.
"""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal, Self, overload

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor
from typing_extensions import TypeVar

from surgeon.blocks import base
from surgeon.blocks.anatomy import BranchKernel
from surgeon.conv import streams
from surgeon.conv.spec import ConvSpec
from surgeon.conv.streams import Ranges

Streams = tuple[Tensor, Tensor | None]
_Count = Annotated[int, Field(ge=0)]


class TwoStreamOptions(base.BlockOptions):
    """What share of the channels is low, before and behind a conv, and how far its streams go."""

    alpha: float = Field(0.5, ge=0, lt=1, description="share of low channels, before and behind the conv")
    alpha_in: float | None = Field(
        None, ge=0, lt=1, description="share before the conv; if left out, it is planned by what the conv reads"
    )
    alpha_out: float | None = Field(
        None, ge=0, lt=1, description="share behind the conv; if left out, it is planned by what reads the conv"
    )
    low_in: tuple[tuple[_Count, _Count], ...] | None = Field(
        None,
        description="the low input channels as pairs of start and stop, where they are not the last; set by planning",
    )
    downsample: Literal["paper", "pool-both"] = Field(
        "paper",
        description="at stride 2, paper: the low stream goes into the high one without being pooled; pool-both: both "
        "streams are pooled first, as a second lineage of code does",
    )
    min_size: int = Field(
        6, ge=1, description="a conv whose low map would have a shorter side than this writes high channels only"
    )
    strided: Literal["pool", "keep"] = Field(
        "keep",
        description="a conv of stride 2 without low channels, right behind a region: keep: it stays as it is; pool: it "
        "is pooled, then convolved at stride 1, as in the paper's code, which saves nothing",
    )
    low: Literal["last", "least"] = Field(
        "last",
        description="which channels become low: the last ones, or those that lose least, whose order in the network is "
        "changed exactly",
    )
    seams: Literal["remove", "keep"] = Field(
        "remove", description="remove: hand the streams on from conv to conv; keep: each conv splits and joins"
    )

    @model_validator(mode="after")
    def _ranges_follow_each_other(self) -> Self:
        borders = [border for limits in self.low_in or () for border in limits]
        are_empty = any(one >= other for one, other in zip(borders[::2], borders[1::2], strict=True))
        if are_empty or borders != sorted(borders):
            raise ValueError("low_in needs ranges [start, stop] in ascending order, none of them empty")
        return self

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `low` out where it says nothing, so that plans stay as earlier releases write and read them."""
        said: dict[str, Any] = handler(self)
        return {name: value for name, value in said.items() if (name, value) != ("low", "last")}

    @property
    def alphas(self) -> tuple[float, float]:
        """The shares before and behind the conv."""
        before, behind = self.alpha_in, self.alpha_out
        return self.alpha if before is None else before, self.alpha if behind is None else behind

    def ranges(self, spec: ConvSpec) -> tuple[Ranges, Ranges]:
        """The low channels before and behind the conv."""
        before, behind = self.alphas
        low_in = streams.last(before, spec.c_in) if self.low_in is None else self.low_in
        return low_in, streams.last(behind, spec.c_out)


# What would change that a conv stays, by words of the reason.
_REMEDIES = {
    "min_size": "a larger input would change that, or a smaller `min_size`",
    "mixes channels": "two streams go through batch norms, not through norms that mix channels",
    "needs the whole map": "two streams go through steps that treat every channel alone",
    "its groups cannot make any": "convs without groups before them would have to write low channels",
    "no graph is known": "`surgeon survey MODEL` says why its code cannot be traced",
}
Opts = TypeVar("Opts", bound=TwoStreamOptions, default=Any)


class TwoStreams(base.Operator):
    """An operator on two streams: (n, c_in, h, w) → (n, c_out, h', w'), or a pair of streams → such a pair.

    The low stream of a pair is None where there is none. `low_in` and `low_out` are the ranges of the low channels.
    """

    downsample: str
    low_in: Ranges
    low_out: Ranges

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Streams) -> Streams: ...

    def forward(self, input: Tensor | Streams) -> Tensor | Streams:
        if not isinstance(input, Tensor):
            return self.core(*input)
        high, low = self.core(*(streams.split(input, self.low_in) if self.low_in else (input, None)))
        return high if low is None else streams.join(high, low, self.low_out)

    @abc.abstractmethod
    def core(self, high: Tensor, low: Tensor | None) -> Streams:
        """Convolve the two streams: (n, high, h, w) and (n, low, ⌈h/2⌉, ⌈w/2⌉) or None, to the like."""

    def role(self) -> base.Role:
        low: base.Role = {"low_in": in_words(self.low_in), "low_out": in_words(self.low_out)}
        return low | {"downsample": self.downsample} if self.spec.stride == (2, 2) else low

    def extra_repr(self) -> str:
        words = [str(self.spec), f"low {in_words(self.low_in)} → {in_words(self.low_out)}"]
        return ", ".join([*words, *[f"downsample={self.downsample}"] * (self.spec.stride == (2, 2))])

    def by_path(self, kernel: Tensor) -> list[BranchKernel]:
        """Take a kernel (out, in/groups, kh, kw) apart into those of the paths between streams, zero elsewhere."""
        spec, device = self.spec, kernel.device
        reads, writes = torch.zeros(spec.c_in, device=device), torch.zeros(spec.c_out, device=device)
        for stream, ranges in ((reads, self.low_in), (writes, self.low_out)):
            for start, stop in ranges:
                stream[start:stop] = 1
        read = reads.view(spec.groups, -1).repeat_interleave(spec.c_out // spec.groups, 0)  # (out, in/groups)
        made = []
        for to_low in range(1 + bool(self.low_out)):
            for from_low in range(1 + bool(self.low_in)):
                mask = (writes[:, None] == to_low) & (read == from_low)
                name = f"{'low' if from_low else 'high'} to {'low' if to_low else 'high'}"
                made.append(BranchKernel(name, kernel.detach().double() * mask[:, :, None, None]))
        return made

    def resampled(self, high: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
        """Give h, l on its way to the high stream, l on its way to the low one; and whether the second needs up."""
        if self.spec.stride == (1, 1):
            return high, low, low, True
        pooled, pools_both = None if low is None else streams.pool(low), self.downsample == "pool-both"
        return streams.pool(high), pooled if pools_both else low, pooled, pools_both


class TwoStreamBlock(TwoStreams, base.Deployable[Opts]):
    """A block that two streams go through. `keeps_seams`: it splits and joins them by itself, at every call."""

    planner = "surgeon.octave.roles:assign"
    is_cheaper = True

    keeps_seams: bool

    @classmethod
    def remedy(cls, reason: str) -> str | None:
        for words, remedy in _REMEDIES.items():
            if words in reason:
                return remedy
        return None


def in_words(ranges: Ranges) -> str:
    return " ".join(f"{start}:{stop}" for start, stop in ranges) or "none"
