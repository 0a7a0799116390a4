"""Which of several levels each of many choices takes, so that a cost or a loss stays within a limit.

    minimise Σ loss_i(k_i)  subject to  fixed + Σ_p macs_p(k_i, i ∈ choices of p) ≤ limit

Level 0 of every choice changes nothing. The cost is a sum of parts, each of which depends on one choice or on a few, as
a conv's does that reads one map of two streams and writes another. Choices are decided one after the other; a state is
the levels of those that later parts still ask for, and of all ways to get there only those are kept that no other beats
in both cost and loss. That is exact; where there are too many states, the best of each range of costs are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

_MOST_STATES = 6000
_BINS = 600  # ranges of cost that are told apart where there are more


@dataclass(frozen=True, slots=True)
class Part:
    """A cost that depends on the levels of some choices: by their numbers, and by these levels in this order."""

    choices: tuple[int, ...]
    macs: Mapping[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Table:
    """The losses of every level of every choice, and what combinations of levels cost."""

    losses: tuple[tuple[float, ...], ...]
    parts: tuple[Part, ...]
    fixed: int = 0

    def cost(self, levels: Sequence[int]) -> int:
        """>>> Table(((0, 1.0),), (Part((0,), {(0,): 9, (1,): 4}),), fixed=1).cost([1])
        5
        """
        return self.fixed + sum(part.macs[tuple(levels[i] for i in part.choices)] for part in self.parts)

    def loss(self, levels: Sequence[int]) -> float:
        return sum(losses[level] for losses, level in zip(self.losses, levels, strict=True))


@dataclass(frozen=True, slots=True)
class Way:
    """One level for every choice, with its cost and its loss."""

    cost: int
    loss: float
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """What was decided so far; earlier decisions are found by following `before`."""

    cost: int
    loss: float
    level: int
    before: _State | None

    @property
    def levels(self) -> tuple[int, ...]:
        found, state = [], self
        while state.before is not None:
            found.append(state.level)
            state = state.before
        return tuple(reversed(found))


def ways(table: Table) -> list[Way]:
    """List the ways that no other beats in both cost and loss, the dearest first.

    >>> parts = (Part((0,), {(0,): 9, (1,): 4}), Part((1,), {(0,): 9, (1,): 4}))
    >>> [(way.cost, way.levels) for way in ways(Table(((0, 1.0), (0, 5.0)), parts))]
    [(18, (0, 0)), (13, (1, 0)), (8, (1, 1))]
    """
    states: dict[tuple[int, ...], list[_State]] = {(): [_State(table.fixed, 0.0, 0, None)]}
    open_: tuple[int, ...] = ()  # the choices whose levels are the keys of states
    for i, losses in enumerate(table.losses):
        due = [part for part in table.parts if max(part.choices) == i]
        later = {j for part in table.parts if max(part.choices) > i for j in part.choices}
        kept = tuple(j for j in (*open_, i) if j in later)
        found: dict[tuple[int, ...], list[_State]] = defaultdict(list)
        for key, held in states.items():
            for level, loss in enumerate(losses):
                known = dict(zip((*open_, i), (*key, level), strict=True))
                cost = sum(part.macs[tuple(known[j] for j in part.choices)] for part in due)
                group = found[tuple(known[j] for j in kept)]
                group += [_State(one.cost + cost, one.loss + loss, level, one) for one in held]
        states, open_ = _thinned({key: _front(group) for key, group in found.items()}), kept
    best = _front(one for held in states.values() for one in held)
    return [Way(one.cost, one.loss, one.levels) for one in reversed(best)]


def within(found: Iterable[Way], macs: int) -> Way | None:
    """Give the way of least loss that costs no more; None where none does."""
    fitting = [way for way in found if way.cost <= macs]
    return min(fitting, key=lambda way: (way.loss, way.cost)) if fitting else None


def below(found: Iterable[Way], loss: float) -> Way | None:
    """Give the cheapest way that loses no more; None where none does."""
    fitting = [way for way in found if way.loss <= loss]
    return min(fitting, key=lambda way: (way.cost, way.loss)) if fitting else None


def evenly(found: Sequence[Way], count: int, cost: Callable[[Way], float]) -> list[Way]:
    """Take some ways that lie about equally far apart in cost, the dearest and the cheapest among them."""
    if len(found) <= count:
        return list(found)
    first, last = cost(found[0]), cost(found[-1])
    wanted = [first + (last - first) * i / (count - 1) for i in range(count)]
    costs = [cost(way) for way in found]
    nearest = [costs.index(min(costs, key=partial(_apart, at))) for at in wanted]
    return [found[i] for i in sorted(set(nearest))]


def _apart(one: float, other: float) -> float:
    return abs(one - other)


def _front(states: Iterable[_State]) -> list[_State]:
    """Keep those that no other beats in both cost and loss, the cheapest first."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda one: (one.cost, one.loss)):
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    return kept


def _thinned(states: dict[tuple[int, ...], list[_State]]) -> dict[tuple[int, ...], list[_State]]:
    """Where there are too many, keep the cheapest state, and of each range of costs those that lose least."""
    everything = [(one.cost, one.loss, key, one) for key, held in states.items() for one in held]
    if len(everything) <= _MOST_STATES:
        return states
    least, most = min(one[0] for one in everything), max(one[0] for one in everything)
    width = max(1, -(-(most - least + 1) // _BINS))
    bins = defaultdict(list)
    for one in everything:
        bins[(one[0] - least) // width].append(one)
    found: dict[tuple[int, ...], list[_State]] = defaultdict(list)
    cheapest = min(everything, key=lambda one: (one[0], one[1]))
    for held in bins.values():
        held.sort(key=lambda one: (one[1], one[0]))
        for _, _, key, state in held[: _MOST_STATES // _BINS]:
            found[key].append(state)
    if cheapest[3] not in found[cheapest[2]]:
        found[cheapest[2]].append(cheapest[3])
    return {key: _front(held) for key, held in found.items() if held}
