"""The choice of levels on made-up tables, against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from surgeon.fitting import knapsack
from surgeon.fitting.knapsack import Part, Table, below, evenly, ways, within


def _table(seed: int, *, chained: bool) -> Table:
    """Draw a table of five choices; chained, a part also depends on the choice before and on the first one."""
    draw = random.Random(seed)
    counts = [draw.randint(2, 4) for _ in range(5)]
    losses = tuple((0.0, *sorted(draw.random() ** 3 for _ in range(count - 1))) for count in counts)
    shapes = [(i,) for i in range(5)]
    if chained:
        shapes += [(i - 1, i) for i in range(1, 5)] + [(0, 2, 4)]
    parts = []
    for shape in shapes:
        keys = itertools.product(*(range(counts[i]) for i in shape))
        parts.append(Part(shape, {key: draw.randint(20, 60) - 7 * sum(key) for key in keys}))
    return Table(losses, tuple(parts), fixed=draw.randint(0, 50))


def _all(table: Table) -> list[tuple[int, float]]:
    levels = itertools.product(*(range(len(losses)) for losses in table.losses))
    return [(table.cost(one), table.loss(one)) for one in levels]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_chosen_is_the_best_of_all(seed: int, chained: bool) -> None:
    table = _table(seed, chained=chained)
    found, everything = ways(table), _all(table)
    for way in found:
        assert (way.cost, pytest.approx(way.loss)) == (table.cost(way.levels), table.loss(way.levels))
    costs, losses = sorted({cost for cost, _ in everything}), [loss for _, loss in everything]
    for limit in costs[:: len(costs) // 7]:
        way = within(found, limit)
        assert way is not None
        assert way.cost <= limit
        assert way.loss == pytest.approx(min(loss for cost, loss in everything if cost <= limit))
    for least in (0.0, 0.1, max(losses)):
        way = below(found, least)
        assert way is not None
        assert way.loss <= least
        assert way.cost == min(cost for cost, loss in everything if loss <= least + 1e-12)
    assert within(found, costs[0] - 1) is None
    assert below(found, -1.0) is None


@pytest.mark.parametrize("seed", range(4))
def test_where_there_are_too_many_states_the_limit_is_kept_and_little_is_lost(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knapsack, "_MOST_STATES", 60)
    monkeypatch.setattr(knapsack, "_BINS", 20)
    table = _table(seed, chained=True)
    found, everything = ways(table), _all(table)
    least, most = min(everything)[0], max(everything)[0]
    way = within(found, least)
    assert way is not None
    assert way.cost == least
    for share in (0.25, 0.5, 0.75):
        limit = round(least + share * (most - least))
        way = within(found, limit)
        assert way is not None
        assert way.cost <= limit
        assert way.loss <= 1.5 * min(loss for cost, loss in everything if cost <= limit) + 1e-9


def test_the_ways_get_cheaper_and_lose_more() -> None:
    found = ways(_table(3, chained=True))
    assert found[0].loss == 0
    assert all(a.cost > b.cost and a.loss < b.loss for a, b in itertools.pairwise(found))
    some = evenly(found, 5, lambda way: way.cost)
    assert {some[0], some[-1]} == {found[0], found[-1]}
    assert len(some) <= 5
