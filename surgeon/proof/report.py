"""What `verify` answers: checks, distances, sites and the verdict. It is plain data, and it can be shown as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import RenderableType

from surgeon.display.report import report_view
from surgeon.display.shown import Shown
from surgeon.proof.agreement import Agreement

SCHEMA = "verify-1"  # of `Report.to_dict`; docs/schemas has it
Verdict = Literal["equivalent", "different", "approximate"]
Asks = Literal["mathematics", "storage", "arithmetic"]  # is it right, is what is stored that, does it round no worse
Unit = Literal["relative L2", "relative maximum", "ulp", "count", "times"]  # "times": of what rounding explains


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was asked: what was measured, its limit, and whether it stays within that limit.

    `asks`: which of the three questions it belongs to; `noise`: what rounding alone does, where that is known.
    """

    name: str
    measured: float
    limit: float
    passed: bool
    says: str
    asks: Asks = "mathematics"
    unit: Unit = "relative L2"
    noise: float | None = None


@dataclass(frozen=True, slots=True)
class SiteDistance:
    """How far B is from A at one conv or block, relative L2 in float64 as stored.

    `isolated`: both get A's input; `propagated`: each gets its own; None where the two do not take the same input or
    give another shape, as one with two streams does. `ulps`: the worst stored tensor against the replay.
    """

    path: str
    kind_a: str
    kind_b: str
    isolated: float | None
    propagated: float | None
    ulps: float | None
    diverges: bool

    @property
    def parts(self) -> bool:
        """The old name of `diverges`."""
        return self.diverges


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many numbers of the outputs are how far apart: |b − a|, in bins of equal width in log₁₀.

    Bin i counts the numbers from 10^(lowest + i · width) up to the next bin. `equal`: those that do not differ;
    `odd`: those that are NaN or Inf in A or B, and not the same in both.
    """

    lowest: float
    width: float
    counts: tuple[int, ...]
    equal: int
    odd: int


@dataclass(frozen=True, slots=True)
class TensorDistance:
    """How far B, or the replay, is from A, or B from the replay, in one tensor of a step: a call, and what follows it.

    `kind`: an output, a statistic after the step, or a gradient; `against`: A, or the replay with B's tensors.
    """

    kind: Literal["output", "statistic", "gradient"]
    name: str  # A's name of it
    against: Literal["A", "the replay"]
    found: float
    limit: float

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        if self.kind == "output":
            return f"output {self.name}"
        return f"the gradient of {self.name}" if self.kind == "gradient" else self.name

    @property
    def passed(self) -> bool:
        """Whether it is within its limit, and the limit excludes something."""
        return math.isfinite(self.limit) and self.found <= self.limit


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the outputs of B are from those of A in their own dtype, for one input; the worst output counts."""

    input: str
    float64: float | None  # relative L2 with both run in float64 as stored; None where they do not
    own: float  # relative L2 in the models' own dtype
    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    top1: float | None  # share of rows whose largest entry is the same one
    histogram: Histogram | None = None  # of the differences in the models' own dtype, over all outputs together


@dataclass(frozen=True, slots=True)
class Guess:
    """What probably went wrong at one module, in words and with the evidence.

    `residual`: relative L2 between B and what this fault would have made of it.
    """

    path: str
    kind: str
    says: str
    residual: float


@dataclass(frozen=True, slots=True)
class Bisected:
    """The smallest set of modules that, put right, make the difference vanish; empty if no set of modules does.

    `runs`: how often a network was run to find it. `is_seen`: whether any input shows a difference in the outputs.
    """

    sites: tuple[str, ...]
    runs: int
    says: str
    is_seen: bool = True


@dataclass(frozen=True, slots=True)
class Report(Shown):
    """The answer of `verify`; it is true if A and B are equivalent."""

    verdict: Verdict
    dtype: str
    checks: tuple[Check, ...]
    distances: tuple[Distance, ...]
    sites: tuple[SiteDistance, ...]
    remarks: tuple[str, ...] = ()
    data: Agreement | None = None  # what both make of the user's images; no part of the verdict
    guesses: tuple[Guess, ...] = ()
    bisected: Bisected | None = None
    mode: Literal["eval", "train"] = "eval"
    tensors: tuple[TensorDistance, ...] = ()  # of a step, where train mode or gradients were asked for
    for_every_input: bool = False  # it was shown for every input, and not only for those that were run

    @property
    def equivalent(self) -> bool:
        return self.verdict == "equivalent"

    @property
    def first_to_diverge(self) -> str | None:
        """The first site, in order of execution, that is not what it should be."""
        return next((site.path for site in self.sites if site.diverges), None)

    @property
    def first_to_part(self) -> str | None:
        """The old name of `first_to_diverge`."""
        return self.first_to_diverge

    def __bool__(self) -> bool:
        return self.equivalent

    def why(self) -> tuple[str, ...]:
        """What probably went wrong, and the modules that explain it, in sentences; nothing decides by them."""
        guessed = (f"probably, at {one.path or 'the model'} ({one.kind}): {one.says}" for one in self.guesses)
        return (*guessed, *([] if self.bisected is None else [f"bisected: {self.bisected.says}"]))

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `first_to_part`, and `parts` of a site, are the old names of what diverges."""
        first = self.first_to_diverge
        data: dict[str, Any] = {"schema": SCHEMA, "equivalent": self.equivalent, "first_to_diverge": first}
        data |= {"first_to_part": first} | asdict(self)
        data["tensors"] = tuple(asdict(one) | {"diverges": not one.passed} for one in self.tensors)
        data["sites"] = tuple(site | {"parts": site["diverges"]} for site in data["sites"])
        return data

    def __rich__(self) -> RenderableType:
        return report_view(self, verdict_first=True)
