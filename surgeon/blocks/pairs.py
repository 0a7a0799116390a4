"""Batch norms that also take a feature map in two streams.

    norm(join(h, l)) = join(norm[high] h, norm[low] l)

with the norm's own tensors, cut: its channels are independent of each other. Exact in eval mode. In train mode the low
stream is a sample of a quarter of the pixels: its mean and variance are the same, and its running variance, which torch
corrects by n/(n−1), is that of the smaller n. What the class of a norm runs behind it (an activation) runs on each
stream.

On CUDA, a norm in train mode and what follows it on a stream, a sum and an activation, are one pass over memory
(`one_pass.normed`): where the class of the norm runs the activation, and in rewritten graphs (`finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon._torch_compat import BatchNorm, sizes
from surgeon.blocks import activations, in_one_step, norms
from surgeon.blocks.norms import FrozenNorm, HasRest
from surgeon.conv import kernels, streams
from surgeon.conv.streams import Pair, Ranges
from surgeon.nn import become_
from surgeon.one_pass import normed, where
from surgeon.one_pass.streams import ACTIVATIONS

Beside = Sequence[Tensor | None]


class PairRest(HasRest):
    """What is left of a norm of two streams that has been folded into the conv before it."""

    __module__ = "surgeon.nn"

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Pair) -> Pair: ...

    def forward(self, input: Tensor | Pair) -> Tensor | Pair:
        return self.behind(input) if isinstance(input, Tensor) else (self.behind(input[0]), self.behind(input[1]))


class OfPairs(HasRest):
    """A norm of two streams."""

    low: Ranges

    def left(self) -> nn.Module:
        made = PairRest()
        made.training = self.training
        made.then, made._modules = self.then, {name: self._modules[name] for name in self.then}
        return made


class PairNorm(OfPairs, nn.BatchNorm2d):
    """(n, c, h, w) → the same, as any BatchNorm2d; or (high, low) → (high, low). `low` are ranges of channels."""

    __module__ = "surgeon.nn"

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Pair) -> Pair: ...

    def forward(self, input: Tensor | Pair) -> Tensor | Pair:
        if isinstance(input, Tensor):
            return self.behind(super().forward(input))
        if (word := self._word_behind()) and self.fits_one_pass(input, ()):
            return self.in_one_pass(input, (None, None), (word, word))
        factor = self._factor()
        high, low = streams.others(self.low, self.num_features), self.low
        return (
            self.behind(self._normed(input[0], high, factor)),
            self.behind(self._normed(input[1], low, factor)),
        )

    def fits_one_pass(self, input: Pair, beside: Beside) -> bool:
        """Whether nobody can tell if the norm and what follows it are one step of autograd, and that step is faster."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or in_one_step.is_watched():
            return False
        held = (self.weight, self.bias, self.running_mean, self.running_var)
        given = [t for t in (*input, *beside, *held) if t is not None]
        if any(type(t) not in in_one_step.PLAIN or not t.is_floating_point() for t in given):
            return False
        if any(t.device != input[0].device for t in given) or not any(t.requires_grad for t in given):
            return False
        return where.has_triton() and where.is_place(input[0])

    def in_one_pass(self, input: Pair, beside: Beside, then: Sequence[str]) -> Pair:
        """Norm each stream, add what is beside it, and apply an activation (`one_pass.streams.ACTIVATIONS`)."""
        factor = self._factor()
        high = self._normed(input[0], streams.others(self.low, self.num_features), factor, beside[0], then[0])
        return high, self._normed(input[1], self.low, factor, beside[1], then[1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_in_words(self.low)}"  # type: ignore[no-untyped-call]

    def _factor(self) -> float:
        """Count a batch, and say what weight it has in the running statistics."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                factor = 1.0 / float(self.num_batches_tracked)
        return factor

    def _word_behind(self) -> str | None:
        """Name the activation that its class runs behind the norm, if that is all; '' for none."""
        words = [activations.word_of(self.get_submodule(name)) for name in self.then]
        found = [word for word in words if word != ""]
        return "" if not found else found[0] if len(found) == 1 else None

    def _normed(
        self, x: Tensor, ranges: Ranges, factor: float, beside: Tensor | None = None, then: str | None = None
    ) -> Tensor:
        """Norm some of the channels; in one pass with what follows, if `then` says what that is."""
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if t is None else streams.take(t, ranges, 0) for t in held)
        by_batch = self.training or mean is None
        if then is None:
            made = F.batch_norm(x, mean, var, weight, bias, by_batch, factor, self.eps)
        else:
            made = normed.run(x, normed.Norm(weight, bias, mean, var, factor, self.eps), beside, then)
        if by_batch and len(ranges) > 1:  # those were copies
            for stored, changed in ((self.running_mean, mean), (self.running_var, var)):
                if stored is not None and changed is not None:
                    _put_back_(stored, changed, ranges)
        return made


class PairSyncNorm(OfPairs, nn.SyncBatchNorm):
    """A SyncBatchNorm of two streams: each is what torch's makes of its channels, over all processes of the group."""

    __module__ = "surgeon.nn"

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Pair) -> Pair: ...

    def forward(self, input: Tensor | Pair) -> Tensor | Pair:
        if isinstance(input, Tensor):
            return self.behind(super().forward(input))
        counted = self.num_batches_tracked
        before = None if counted is None else counted.clone()
        made = []
        for x, ranges in zip(input, (streams.others(self.low, self.num_features), self.low), strict=True):
            if counted is not None and before is not None:
                counted.copy_(before)  # both streams are one batch
            made.append(self.behind(self._normed(x, ranges)))
        return made[0], made[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_in_words(self.low)}"  # type: ignore[no-untyped-call]

    def _normed(self, x: Tensor, ranges: Ranges) -> Tensor:
        """Run torch's own forward with the tensors of some channels."""
        part: nn.SyncBatchNorm = nn.Module.__new__(nn.SyncBatchNorm)
        vars(part).update(vars(self))
        names = ("weight", "bias", "running_mean", "running_var")
        cut = {name: streams.take(t, ranges, 0) for name in names if (t := getattr(self, name)) is not None}
        part._parameters, part._buffers = {}, self._buffers | {name: cut.get(name) for name in names}
        made: Tensor = part.forward(x)
        if self.training and len(ranges) > 1:  # those were copies
            for name in names[2:]:
                if name in cut:
                    _put_back_(getattr(self, name), cut[name], ranges)
        return made


class PairFrozenNorm(OfPairs, FrozenNorm):
    """A batch norm of two streams that is not trained."""

    __module__ = "surgeon.nn"

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Pair) -> Pair: ...

    def forward(self, input: Tensor | Pair) -> Tensor | Pair:
        scale, shift = self.scale_and_shift()
        if isinstance(input, Tensor):
            return self.behind(input * scale + shift)
        both = zip(input, (streams.others(self.low, sizes(scale)[0]), self.low), strict=True)
        high, low = (x * streams.take(scale, part, 0) + streams.take(shift, part, 0) for x, part in both)
        return self.behind(high), self.behind(low)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_in_words(self.low)}"


def finish(norm: nn.Module, input: Pair, beside: Beside, then: Sequence[nn.Module | str]) -> Pair:
    """Call a norm with two streams, add what is beside each, and call an activation, or apply one that is named.

    They are one pass where that cannot be told from calling one after the other.
    """
    words = [one if isinstance(one, str) else activations.word_of(one) for one in then]
    known = [word for word in words if word is not None]
    is_plain = type(norm) is PairNorm and PairNorm.forward is _FORWARD and activations.is_left_alone(norm)
    if (
        is_plain
        and isinstance(norm, PairNorm)
        and not norm.then
        and len(known) == len(then)
        and norm.fits_one_pass(input, beside)
    ):
        return norm.in_one_pass(input, beside, known)
    high, low = (_followed(*one) for one in zip(norm(input), beside, then, strict=True))
    return high, low


def _followed(x: Tensor, beside: Tensor | None, then: nn.Module | str) -> Tensor:
    x = x if beside is None else x + beside
    made: Tensor = ACTIVATIONS[then](x, inplace=False) if isinstance(then, str) else then(x)
    return made


def pair_kind(norm: nn.Module, *, is_tried: bool = False) -> type[nn.Module] | None:
    """The class in which a norm takes two streams; None where nobody knows what its class does in train mode.

    One that is not trained, and that somebody has tried, is known.
    """
    if not norms.is_known(norm):
        return PairFrozenNorm if is_tried and norms.is_frozen(norm) else None
    core = norms.core_class_of(norm)
    for kind, forward, paired in (
        (nn.BatchNorm2d, BatchNorm.forward, PairNorm),
        (nn.SyncBatchNorm, nn.SyncBatchNorm.forward, PairSyncNorm),
    ):
        if issubclass(core, paired) or (issubclass(core, kind) and core.forward is forward):
            return paired
    return PairFrozenNorm if norms.is_frozen(norm) else None


def make_pair_norm_(norm: nn.Module, low: Ranges) -> Callable[[], None]:
    """Let a batch norm take pairs; it stays the object it is. Returns a function that undoes this."""
    kind = pair_kind(norm, is_tried=True)
    assert kind is not None
    added: dict[str, object] = {"low": low}
    if rest := norms.rest_of(norm):  # files of earlier versions have none
        added["then"] = rest
    if not hasattr(norm, "eps"):
        added["eps"] = kernels.Norm.of(norm).eps
    return become_(norm, kind, **added)


def _in_words(low: Ranges) -> str:
    return f"low {' '.join(f'{start}:{stop}' for start, stop in low)}"


def _put_back_(stored: Tensor, changed: Tensor, ranges: Ranges) -> None:
    at = 0
    for start, stop in ranges:
        stored[start:stop].copy_(changed[at : at + stop - start])
        at += stop - start


_FORWARD = PairNorm.forward  # as calls find it, unless somebody has replaced it
