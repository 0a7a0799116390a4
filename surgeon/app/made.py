"""What the commands that write a model did, for `display` to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgeon.fitting.fitted import Fitted
from surgeon.surgery.export import Exported
from surgeon.surgery.further import FoldedBranches
from surgeon.surgery.plan import Plan
from surgeon.surgery.precision import Noise
from surgeon.surgery.selfcheck import SelfCheck
from surgeon.surgery.tuned import Tuned


@dataclass(frozen=True, slots=True)
class Converted:
    """What convert did: the plan, what it measured, and where the model is."""

    plan: Plan
    check: SelfCheck
    path: Path
    fitted: Fitted | None = None  # where images were given


@dataclass(frozen=True, slots=True)
class Fused:
    """What fuse did: the blocks that were folded, the parameters before and after, and where the model is."""

    folded: tuple[str, ...]
    params: tuple[int, int]
    distance: float | None
    path: Path
    norms: tuple[str, ...] = ()  # that were given back
    notes: tuple[str, ...] = ()  # what else the user has to know
    branches: tuple[FoldedBranches, ...] = ()  # linear sub-graphs that are one conv now
    folded_norms: tuple[str, ...] = ()  # norms that were folded into the conv before them
    refused: Mapping[str, str] = field(default_factory=dict)  # sums that were not folded, and why
    exported: Exported | None = None  # where the file holds a program
    python: str | None = None  # the class that was written, where `path` is a folder with model.py
    dtype: str | None = None  # what the network was cast to in the end
    noise: Noise | None = None  # what that costs
    tuned: Tuned | None = None  # what was measured of the forms of blocks
