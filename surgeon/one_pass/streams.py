"""What lies between two octave convs, in one pass over memory.

    high   = f(made + up(extra) + bias_high + beside_high)
    low    = f(low' + bias_low + beside_low)
    stack  = pool(high) and low, one behind the other

where `both` = (extra, low') is what one conv has made of the map at half the resolution, `made` what the other conv has
made of the high one, and f is an activation. The next octave conv reads `high` and `stack`, and nothing else. In plain
torch these are up to nine passes; a network on a GPU spends more time in them than in its convs.

Chen et al. 2019, Drop an Octave, arXiv:1904.05049, eq. 2–5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.conv import streams
from surgeon.one_pass.where import uses_triton

ACTIVATIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "": lambda x, inplace: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def activated(x: Tensor, then: str) -> Tensor:
    """Apply an activation to a tensor that nothing else reads: in place where no gradient is asked for."""
    return ACTIVATIONS[then](x, inplace=streams.writes_in_place())


def finish(
    made: Tensor,
    both: Tensor,
    bias: Tensor | None,
    beside: tuple[Tensor, Tensor | None] | None,
    then: str,
    *,
    has_extra: bool,
) -> tuple[Tensor, Tensor]:
    """Finish a pair of streams: (n, high, h, w) and (n, high + low or low, ⌈h/2⌉, ⌈w/2⌉) → high, and the stack.

    `bias` has that of the high channels first. `beside` is another pair, of which the second is a stack or a low
    stream: its last channels are added. `then` is one of `ACTIVATIONS`; without `has_extra`, `both` is low' alone.
    """
    given = [t for t in (made, both, *(beside or ())) if t is not None]
    in_rows = all(t.is_contiguous(memory_format=torch.channels_last) for t in given)
    if uses_triton(*given, bias) and in_rows and len({t.dtype for t in given}) == 1:
        other, other_low = beside or (None, None)
        high, stack = finish_op(made, both, bias, other, other_low, then, has_extra)
        return high, stack
    return plainly(made, both, bias, beside, then, has_extra=has_extra)


def plainly(
    made: Tensor,
    both: Tensor,
    bias: Tensor | None,
    beside: tuple[Tensor, Tensor | None] | None,
    then: str,
    *,
    has_extra: bool,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, step by step."""
    border = made.shape[1]
    high, low = made, both
    if has_extra:
        extra, low = streams.cut(both, border)
        high = streams.add_up(high, extra)
    if bias is not None:
        of_high, of_low = streams.cut(bias[:, None, None], border, 0)
        high, low = streams.add_into(high, of_high), streams.add_into(low, of_low)
    if beside is not None:
        high = streams.add_into(high, beside[0])
        if low.shape[1] and beside[1] is not None:
            low = streams.add_into(low, streams.cut(beside[1], beside[1].shape[1] - low.shape[1])[1])
    high = activated(high, then)
    return high, torch.cat([streams.pool(high), activated(low, then)], 1)


def _finish(
    made: Tensor,
    both: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    beside_low: Tensor | None,
    then: str,
    has_extra: bool,
) -> tuple[Tensor, Tensor]:
    from surgeon.one_pass import streams_triton

    return streams_triton.finish(made, both, bias, beside, beside_low, then, has_extra)


# torch.compile looks into this one, and compiles the kernel together with what is around it.
finish_op: Any = torch.library.triton_op(
    "surgeon::finish_streams",
    _finish,
    mutates_args=(),
    schema="(Tensor made, Tensor both, Tensor? bias, Tensor? beside, Tensor? beside_low, str then, bool has_extra)"
    " -> (Tensor, Tensor)",
)


@finish_op.register_fake  # type: ignore[untyped-decorator]
def _shapes(
    made: Tensor,
    both: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    beside_low: Tensor | None,
    then: str,
    has_extra: bool,
) -> tuple[Tensor, Tensor]:
    channels = both.shape[1] + (0 if has_extra else made.shape[1])
    stack = both.new_empty((both.shape[0], channels, *both.shape[2:])).to(memory_format=torch.channels_last)
    return torch.empty_like(made, memory_format=torch.channels_last), stack
