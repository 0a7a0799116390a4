"""A batch norm that also takes a feature map in two streams.

    norm(join(h, l)) = join(norm[high] h, norm[low] l)

with the norm's own tensors, cut: its channels are independent of each other. Exact in eval mode. In train mode the low
stream is a sample of a quarter of the pixels: its mean and variance are the same, and its running variance, which torch
corrects by n/(n−1), is that of the smaller n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.conv import streams
from surgeon.conv.streams import Pair, Ranges
from surgeon.nn import Stored, become_


class PairNorm(Stored, nn.BatchNorm2d):
    """(n, c, h, w) → the same, as any BatchNorm2d; or (high, low) → (high, low). `low` are ranges of channels."""

    __module__ = "surgeon.nn"

    low: Ranges

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Pair) -> Pair: ...

    def forward(self, input: Tensor | Pair) -> Tensor | Pair:
        if isinstance(input, Tensor):
            return super().forward(input)
        factor = self._factor()
        return (
            self._normed(input[0], streams.others(self.low, self.num_features), factor),
            self._normed(input[1], self.low, factor),
        )

    def extra_repr(self) -> str:
        usual = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{usual}, low {' '.join(f'{start}:{stop}' for start, stop in self.low)}"

    def _factor(self) -> float:
        """Count a batch, and say what weight it has in the running statistics."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                factor = 1.0 / float(self.num_batches_tracked)
        return factor

    def _normed(self, x: Tensor, ranges: Ranges, factor: float) -> Tensor:
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if t is None else streams.take(t, ranges, 0) for t in held)
        by_batch = self.training or mean is None
        made = F.batch_norm(x, mean, var, weight, bias, by_batch, factor, self.eps)
        if by_batch and len(ranges) > 1:  # those were copies
            for stored, changed in ((self.running_mean, mean), (self.running_var, var)):
                if stored is not None and changed is not None:
                    _put_back_(stored, changed, ranges)
        return made


def make_pair_norm_(norm: nn.Module, low: Ranges) -> Callable[[], None]:
    """Let a BatchNorm2d take pairs; it stays the object it is. Returns a function that undoes this."""
    return become_(norm, PairNorm, low=low)


def _put_back_(stored: Tensor, changed: Tensor, ranges: Ranges) -> None:
    at = 0
    for start, stop in ranges:
        stored[start:stop].copy_(changed[at : at + stop - start])
        at += stop - start
