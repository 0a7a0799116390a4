"""What a block consists of, as a researcher would look at it: the kernels that add up to the one that it computes with.

F = Σ_i γ_i/σ_i · F_i      each laid into the frame of the whole kernel, with zeros where it has no taps
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BranchKernel:
    """One of the kernels that a block's kernel is the sum of, in float64.

    Attributes:
        name: what the branch is called in tables.
        kernel: (out, in/groups, kh, kw) in the frame of the whole kernel, already scaled by γ/σ.
        gamma: (out,) what is learnt to scale the branch, where something is.
        sigma: (out,) what its norm divides by, where it has a norm.
    """

    name: str
    kernel: Tensor
    gamma: Tensor | None = None
    sigma: Tensor | None = None
