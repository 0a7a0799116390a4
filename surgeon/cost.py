"""What a module costs: parameters, stored bytes, and multiply-adds at an input.

Multiply-adds (MACs) are half the FLOPs that torch's own `FlopCounterMode` counts while the module runs on the meta
device: convolutions and matrix products, as executed. Norms, activations, pooling and copies are free to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from surgeon.capture import in_mode, quietly, shadow, to_meta


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters and bytes of parameters and buffers; MACs are None where no input is known."""

    params: int
    bytes: int
    macs: int | None

    def __add__(self, other: Cost) -> Cost:
        return self._with(other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return self._with(other, -1)

    def _with(self, other: Cost, sign: int) -> Cost:
        macs = None if self.macs is None or other.macs is None else self.macs + sign * other.macs
        return Cost(self.params + sign * other.params, self.bytes + sign * other.bytes, macs)


def measure(module: nn.Module, inputs: Sequence[Tensor] | None = None) -> Cost:
    """Count the cost of a module in eval mode; MACs for one call with `inputs`, of which only the shapes matter.

    >>> import torch
    >>> measure(nn.Conv2d(3, 8, 3, padding=1), [torch.zeros(1, 3, 10, 10)])
    Cost(params=224, bytes=896, macs=21600)
    """
    params, buffers = list(module.parameters()), list(module.buffers())
    stored = sum(t.numel() * t.element_size() for t in (*params, *buffers))
    return Cost(sum(p.numel() for p in params), stored, None if inputs is None else _macs(module, inputs))


def _macs(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    try:
        return _count(shadow(module, to_meta), [to_meta(t) for t in inputs])
    except Exception:  # a network that looks at values runs for real
        return _count(shadow(module), inputs)


def _count(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    cast = [t.to(like.dtype) if like is not None and t.is_floating_point() else t for t in inputs]
    with quietly(), FlopCounterMode(display=False) as counter:
        in_mode(module, False)(*cast)
    return int(counter.get_total_flops()) // 2
