"""What there is to show on a page: plain facts that others have measured. Every field may be empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgeon.analysis.sites import Survey
from surgeon.figures.kernels import KernelFigures
from surgeon.page.flow import Flow
from surgeon.proof.report import Report
from surgeon.surgery.bench import Timing
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Plan


@dataclass(frozen=True, slots=True)
class Part:
    """One module of a network: its path, its class, and the parameters in it that are in no module below it."""

    path: str
    kind: str
    params: int


@dataclass(frozen=True, slots=True)
class Looked:
    """One model of the page: what it is called, its modules in their order, its convs, and what was done to it."""

    name: str
    parts: tuple[Part, ...] = ()
    survey: Survey | None = None
    blocks: frozenset[str] = frozenset()  # the paths of surgeon's blocks in it
    history: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageData:
    """All that one page shows. What was not measured, or is not there, is empty, and its section is left out."""

    title: str
    command: str | None = None  # that made the page, as a user would write it
    models: tuple[Looked, ...] = ()  # the model, or A and B
    plan: Plan | None = None  # what becomes of the first model's convs, or became of them
    is_planned: bool = False  # the plan is still to be carried out
    report: Report | None = None  # of `verify`, B against A
    timings: tuple[Timing, ...] = ()  # of `bench`
    flows: tuple[Flow, ...] = ()  # how two streams go through each island
    kernels: KernelFigures | None = None  # of the models that have kernels of more than one tap
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str | None = None  # as it is to be written; None writes none

    @property
    def history(self) -> tuple[Operation, ...]:
        """What was done to the last model that has a history: it is the longer one, where B was made from A."""
        return next((one.history for one in reversed(self.models) if one.history), ())
