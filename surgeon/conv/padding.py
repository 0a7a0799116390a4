"""Convs that pad their input first, by a rule of their own: a conv of torch pads both sides of an axis alike.

TensorFlow's SAME pads as much as makes the result ⌈size / stride⌉ rows high, and puts the odd one last:

    total = max((⌈size / s⌉ − 1)·s + d·(k − 1) + 1 − size, 0),   before = ⌊total / 2⌋,   after = total − before

So at stride 2 it depends on the input: a 3×3 kernel pads an even side by 0 and 1, and an odd one by 1 and 1. What a
conv pads with is zeros, and fixed amounts are given as (top, bottom, left, right).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from surgeon.nn import Stored

Sides = tuple[int, int, int, int]  # top, bottom, left, right
PadsInput = Literal["same"] | Sides


def same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """How much TensorFlow's SAME pads an axis of this size before and after.

    >>> same(8, 3, 2, 1), same(9, 3, 2, 1), same(1, 5, 1, 1)
    ((0, 1), (1, 1), (2, 2))
    """
    total = (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size
    total = total.clamp(min=0) if isinstance(total, Tensor) else max(total, 0)  # sizes are tensors in a trace
    return total // 2, total - total // 2


def padded(x: Tensor, rule: PadsInput, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Pad a map (…, h, w) with zeros, as the rule says for a conv of this geometry."""
    if rule == "same":
        axes = zip(x.shape[-2:], kernel, stride, dilation, strict=True)
        (top, bottom), (left, right) = (same(*axis) for axis in axes)
    else:
        top, bottom, left, right = rule
    return nn.functional.pad(x, (left, right, top, bottom))  # last axis first


class PaddedConv2d(Stored, nn.Conv2d):
    """A conv that pads its input with zeros first: by TensorFlow's SAME, or (top, bottom, left, right)."""

    __module__ = "surgeon.nn"

    def __init__(self, *args: Any, pads_input: PadsInput, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pads_input = pads_input

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(padded(input, self.pads_input, self.kernel_size, self.stride, self.dilation))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pads_input={self.pads_input}"  # type: ignore[no-untyped-call]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if not is_rule(vars(self).get("pads_input")):
            raise ValueError("PaddedConv2d has a pads_input that is no rule")


def is_rule(value: object) -> bool:
    """Whether something says how an input is padded: what a file holds may be anything.

    >>> is_rule("same"), is_rule((0, 1, 0, 1)), is_rule((0, -1, 0, 1)), is_rule("SAME")
    (True, True, False, False)
    """
    if isinstance(value, tuple):
        return len(value) == 4 and all(type(side) is int and side >= 0 for side in value)
    return isinstance(value, str) and value == "same"
