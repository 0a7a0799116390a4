"""Calls that take turns: every round times each of them once, in a newly drawn order, and ratios count within a round.

Absolute times on a shared machine mean little and drift; a drift hits all calls of a round alike.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from surgeon.surgery.clocks import Call, Clock

AT_LEAST = 0.05  # seconds that one measurement takes; shorter calls are repeated within it


@dataclass(slots=True)
class Runner:
    """A call that has settled, how often it is repeated within a measurement, and the seconds of each round."""

    call: Call
    clock: Clock
    repeats: int
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def settled(cls, call: Call, clock: Clock, *, at_least: float = AT_LEAST) -> Runner:
        """Run a call until it has settled, and find out how often to repeat it."""
        clock.warm_up(call)
        once = min(clock.seconds(call, 1) for _ in range(3))
        return cls(call, clock, max(1, math.ceil(at_least / once)))


def take_(runners: Sequence[Runner], rounds: int, *, say: Callable[[int], None] = lambda _: None) -> None:
    """Time each of them once in every round; `say` is told how many rounds are done."""
    order = random.Random(0)
    for done in range(rounds):
        say(done)
        for one in order.sample(runners, len(runners)):
            one.seconds.append(one.clock.seconds(one.call, one.repeats))


def ratio(one: Runner, first: Runner) -> tuple[float, float, float]:
    """Give the quartiles of the ratios within each round; the median is in the middle."""
    return quartiles([mine / theirs for mine, theirs in zip(one.seconds, first.seconds, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Give the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
