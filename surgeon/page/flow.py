"""How two streams go through the graph of an island, as plain data that can be drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlowStep:
    """One step that is drawn: what it is, which steps it reads, and the channels of both streams behind it."""

    name: str  # the path of the module, or what the function is called
    kind: str  # conv, norm, act, pool, sum, cat, input, output, join, split, other
    reads: tuple[int, ...]  # places of earlier steps
    high: int | None  # channels; None where it is not known
    low: int | None  # 0 where there is no low stream
    seam: str | None = None  # why two streams are joined or split here


@dataclass(frozen=True, slots=True)
class Flow:
    """An island whose graph two streams go through: its path, and its steps in order."""

    island: str
    steps: tuple[FlowStep, ...]
