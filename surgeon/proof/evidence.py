"""What `verify` measures: one `Measured` for every input, and all of it together, which the checks judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from surgeon.proof.distance import EXACT, Apart
from surgeon.proof.every_input import EveryInput
from surgeon.proof.isolated import Gap
from surgeon.proof.report import Distance, TensorDistance
from surgeon.proof.ulps import Off


@dataclass(frozen=True, slots=True)
class Replay:
    """B made anew from A: in float64 throughout, and with every tensor rounded between two operations, as in files.

    `dtype` is what B was cast to, if it was; then A is compared with it in that dtype. `came_from` gives the names of
    A's tensors that have another one in the replay, by A's. `keeps_training`: it is meant to compute what A does in
    train mode, too.
    """

    exact: nn.Module
    rounded: nn.Module
    dtype: torch.dtype | None = None
    came_from: Mapping[str, str] = field(default_factory=dict)
    keeps_training: bool = False


@dataclass(frozen=True, slots=True)
class Exactness:
    """How far the replay is from A in float64: its outputs, and its blocks where outputs alone cannot tell."""

    outputs: float | None  # the one that is furthest beyond its limit; None where A's outputs cannot tell
    limit: float = EXACT
    blocks: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured for one input."""

    label: str  # of the input
    is_probe: bool = False  # surgeon has drawn it, beside the user's own
    distance: Distance | None = None  # None where the shapes of outputs depend on rounding, and for a probe
    exact: Exactness | None = None  # replay against A
    modules: float | None = None  # B against the replay with B's tensors, in float64 if A runs there
    storage: list[tuple[Apart, Apart]] = field(default_factory=list)  # output by output: B, and moved A, against A
    rounding: list[tuple[Apart, Apart]] = field(default_factory=list)  # output by output: B and A in their own dtype,
    # each against itself in float64
    draws: int = 1  # how many inputs of this kind `storage` and `rounding` were measured on
    gaps: dict[str, Gap] = field(default_factory=dict)  # stretches
    merged: frozenset[str] = frozenset()  # modules that one of the models has merged with a neighbour
    wiring: dict[str, float] | None = None  # stretch → what reaches it in B if all before it is A's; "" is the output
    flat: tuple[int, ...] = ()  # outputs of A that do not move when the input does
    outputs: int = 0  # outputs of A that hold numbers
    odd: int = 0  # outputs of B that hold NaN or Inf
    blank: int = 0  # outputs of A in which no number is finite
    failed: str = ""  # what B said to an input that A takes


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step of both models has shown, for one input.

    `departs`: the tensor in which B's mathematics departs from A's most in train mode, where nobody has promised that
    it does not.
    """

    label: str  # of the input
    mode: str  # train or eval
    tensors: tuple[TensorDistance, ...]
    departs: TensorDistance | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured, and the numbers from which the limits are computed."""

    runs: tuple[Measured, ...]  # one for each input
    stored: Mapping[str, Off] | None  # stored tensor → how far it is from the replay's; None without a replay
    same: Mapping[str, Off] | None  # the same without a replay: from A's, for modules of the same class
    structure: Mapping[str, str] | None  # module of B → what the replay did not make; None without a replay
    dtype: torch.dtype  # in which both models are stored
    exact: torch.dtype  # in which they were compared as stored: float64 if A runs there
    margin: float
    arithmetic: float  # relative L2 in `exact` by which two runs may differ through their order alone
    is_compiled: bool = False  # A or B is a file that holds a program
    steps: tuple[Stepped, ...] = ()  # one for each input, if train mode or gradients are asked for
    settings: Mapping[str, str] | None = None  # module → what its norm or dropout has that A's has not
    every_input: EveryInput | None = None  # what was shown of the replay without running inputs, if that was asked for

    @property
    def is_for_every_input(self) -> bool:
        """Whether the replay was shown to equal A for every input."""
        return self.every_input is not None and self.every_input.is_whole

    @property
    def wired(self) -> float:
        """The most by which what reaches a module may differ if all that came before it is A's."""
        return max(EXACT, self.arithmetic)
