"""What a module costs: parameters, stored bytes, and, at an input, multiply-adds and activation bytes.

Multiply-adds (MACs) are half the FLOPs that torch's own `FlopCounterMode` counts while the module runs on the meta
device: convolutions and matrix products, as executed. Norms, activations, pooling and copies count as free.

Activation bytes show what those steps cost: the sizes of all tensors that the run writes, in the model's dtype. A step
that changes its input in place, or returns a view of a tensor, writes no new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from surgeon._torch_compat import TorchDispatchMode, makes_new_tensors, packet_of, pytree
from surgeon.models.call import Inputs, call_of
from surgeon.models.copies import in_mode, shadow, to_meta
from surgeon.models.sandbox import quietly


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters, bytes of parameters and buffers; MACs and activation bytes are None where no input is known."""

    params: int
    bytes: int
    macs: int | None = None
    activations: int | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.bytes + other.bytes,
            None if self.macs is None or other.macs is None else self.macs + other.macs,
            None if self.activations is None or other.activations is None else self.activations + other.activations,
        )

    def times(self, calls: int) -> Cost:
        """The same module called that often in one run."""
        macs, activations = (None if one is None else calls * one for one in (self.macs, self.activations))
        return replace(self, macs=macs, activations=activations)


def measure(module: nn.Module, inputs: Inputs | Sequence[Tensor] | None = None) -> Cost:
    """Count the cost of a module in eval mode, for one call with `inputs`, of which only the shapes matter.

    >>> import torch
    >>> measure(nn.Conv2d(3, 8, 3, padding=1), [torch.zeros(1, 3, 10, 10)])
    Cost(params=224, bytes=896, macs=21600, activations=3200)
    """
    cost = stored(module)
    if inputs is None:
        return cost
    call = call_of(inputs)
    try:
        frozen = shadow(module, to_meta).requires_grad_(False)  # torch fails on a parameter that is given to a module
        return _count(cost, frozen, call.on_meta())
    except Exception:  # a network that looks at values runs for real
        return _count(cost, shadow(module), call)


def stored(module: nn.Module) -> Cost:
    """Count parameters, and the bytes of parameters and buffers."""
    params, buffers = list(module.parameters()), list(module.buffers())
    size = sum(t.numel() * t.element_size() for t in (*params, *buffers))
    return Cost(sum(p.numel() for p in params), size)


def _count(cost: Cost, module: nn.Module, inputs: Inputs) -> Cost:
    given = inputs.cast_for(module)
    with quietly(), Counter() as counter:
        given.call(in_mode(module, False))
    return replace(cost, macs=counter.macs, activations=counter.bytes)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up floating point operations by torch's own formulas, and the bytes of the tensors that are newly written.

    FlopCounterMode itself hooks every module of the process, those that other threads call too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        known = FlopCounterMode(display=False).flop_registry
        aten = torch.ops.aten  # torch's list lacks the forms that add to a tensor in place
        self.formulas = {aten.addmm_: known[aten.addmm], aten.baddbmm_: known[aten.baddbmm], **known}
        self.flops = self.bytes = 0

    @property
    def macs(self) -> int:
        return self.flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(packet_of(func))) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        if makes_new_tensors(func):
            made = (t for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
            self.bytes += sum(t.numel() * t.element_size() for t in made)
        return out
