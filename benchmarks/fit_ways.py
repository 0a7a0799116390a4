"""The recipes and plans that benchmarks/fit.py compares: every site alike, a budget, and as uniform as costs as much.

For an equal cost a uniform HetConv takes the costliest sites first, as many as the budget's multiply-adds allow, with
P = 2, 4 or 8 on all of them; a uniform octave takes the smallest share of low channels that comes down to that cost, or
stays just above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fit_networks import Case

import surgeon
from surgeon.surgery.plan import Plan

VALUES = {"hetconv": (2, 4, 8), "octave": (0.25, 0.5, 0.75)}
BUDGETS = (0.8, 0.7, 0.6)
AT_MOST = 0.05  # by how much more a uniform way may cost, as a share of the original's multiply-adds
Recipe = dict[str, Any]


def recipe(block: str, value: float, case: Case, sites: Sequence[str] | None = None, *, small: bool = False) -> Recipe:
    """Make a recipe that treats all sites alike, or all those that are named.

    `small` lets octaves go down to the smallest maps that the network has for them, instead of stopping at 6 pixels.
    """
    named = {} if sites is None else {"name": list(sites)}
    rule: dict[str, Any]
    if block == "hetconv":
        options = {"p": int(value), "layout": "best", "init": "project"}
        rule = {"swap": block, "match": {"kernel": 3, "groups": 1, **named}, "with": options}
    else:
        options = {"alpha": value} | ({"min_size": case.kind.min_size} if small else {})
        rule = {"swap": block, "with": options}
    stem = {"leave": "the stem", "match": {"in_channels": {"max": 4}}, "optional": True}
    return {"surgeon": 1, "title": f"{block} {value}", "rules": [stem, rule]}


def every_site(block: str, value: float, case: Case) -> Plan:
    """Plan one setting for every site but the stem."""
    if (block, value) not in case.plans:
        case.plans[block, value] = surgeon.plan(case.model, recipe(block, value, case), case.example)
    plan: Plan = case.plans[block, value]
    return plan


def share(plan: Plan) -> float:
    """Say what share of the multiply-adds is left once the network is fused."""
    macs = plan.gained.macs
    assert macs is not None
    return macs.after / macs.before


def uniform(block: str, case: Case, cost: float) -> Iterator[tuple[str, Plan]]:
    """Give the uniform ways that cost as much as `cost`, or a little more."""
    found = _octaves(case, cost) if block == "octave" else _hetconvs(case, cost)
    yield from ((words, plan) for words, plan in found if cost <= share(plan) <= cost + AT_MOST)


def _hetconvs(case: Case, cost: float) -> Iterator[tuple[str, Plan]]:
    for p in VALUES["hetconv"]:
        whole = every_site("hetconv", p, case)
        chosen = _within(whole, cost)
        if chosen:
            plan = surgeon.plan(case.model, recipe("hetconv", p, case, chosen), case.example)
            yield f"P = {p} at {len(chosen)} of {len(whole.swaps)} sites", plan


def _within(whole: Plan, cost: float) -> list[str]:
    """Choose the sites that save most, as long as what is left costs at least `cost`."""
    total = whole.total.macs
    assert total is not None
    left, chosen = total.before, []
    saved = {entry.path: entry.macs.before - entry.macs.after for entry in whole.swaps if entry.macs is not None}
    for path in sorted(saved, key=lambda path: -saved[path]):
        if (left - saved[path]) / total.before >= cost:
            left -= saved[path]
            chosen.append(path)
    return [entry.path for entry in whole.swaps if entry.path in chosen]


def _octaves(case: Case, cost: float) -> Iterator[tuple[str, Plan]]:
    """Search the largest share of low channels, in sixty-fourths, that costs at least `cost`."""
    low, high, best = 1, 60, None
    while low <= high:
        alpha = (low + high) // 2 / 64
        plan = surgeon.plan(case.model, recipe("octave", alpha, case, small=True), case.example)
        if share(plan) >= cost:
            low, best = (low + high) // 2 + 1, (f"α = {alpha:.3g}", plan)
        else:
            high = (low + high) // 2 - 1
    if best is not None:
        yield best
