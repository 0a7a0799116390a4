"""Sums in float64 whose result does not depend on the order in which they are made, but for the rarest of roundings.

Of every addition a + b, what rounding took away is kept beside the sum (Knuth's TwoSum, TAOCP vol. 2, 4.2.2):

    s = a + b,   z = s − a,   rest = (a − (s − z)) + (b − z)

so a total holds about 106 bits, and rounded to float64 it is the same whoever added what first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 2**18  # numbers that are worked on at once: they stay in the processor's cache


class Total:
    """The sum of tensors of one shape.

    >>> total = Total(torch.zeros(1).double())
    >>> for x in (1e16, 1.0, -1e16):
    ...     total.add_(torch.tensor([x]).double())
    >>> total.rounded
    tensor([1.], dtype=torch.float64)
    """

    __slots__ = ("rest", "sum")

    def __init__(self, like: Tensor) -> None:
        """Begin with zeros."""
        self.sum = torch.zeros_like(like, dtype=torch.float64, memory_format=torch.contiguous_format)
        self.rest = torch.zeros_like(self.sum)

    def add_(self, other: Tensor) -> None:
        """Add a tensor."""
        whole, kept, added = self.sum.view(-1), self.rest.view(-1), other.reshape(-1)
        for start in range(0, len(whole), _AT_ONCE):
            a, rest, b = (one[start : start + _AT_ONCE] for one in (whole, kept, added))
            s = a + b
            z = s - a
            rest += (a - (s - z)) + (b - z)
            a.copy_(s)

    def add_total_(self, whole: Tensor, rest: Tensor) -> None:
        """Add another total."""
        self.add_(whole)
        self.rest += rest

    @property
    def rounded(self) -> Tensor:
        """The sum in float64."""
        return self.sum + self.rest
