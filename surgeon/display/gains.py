"""What was gained, in the last line of plans and conversions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgeon.display import words

if TYPE_CHECKING:
    from surgeon.surgery.plan import Change, Plan, Timed


def gain_lines(plan: Plan) -> Iterator[str]:
    """Say what the network costs once it is converted and fused, and how long it takes where that was measured."""
    if not plan.swaps:
        return
    gained = plan.gained
    said = [f"parameters {factor(gained.params)}"]
    if gained.macs is not None and gained.macs.before:
        said.append(f"multiply-adds {factor(gained.macs)}")
    adds_nothing = gained.is_folded and gained.macs is not None and gained.macs.after <= gained.macs.before
    once = ", once it is fused" if gained.is_folded else ""
    yield f"gained{once}: {', '.join(said)}" + ("; the blocks add nothing to what is deployed" if adds_nothing else "")
    if plan.time is not None:
        yield f"time {in_words(plan.time)}"
    yield from promise_lines(plan)


def promise_lines(plan: Plan) -> Iterator[str]:
    """Say for each block where it was measured to be slower than the original: one line, from the first device."""
    for block, rows in plan.broken_promises.items():
        first = rows[0]
        alike = [row for row in rows if (row.name, row.network, row.way) == (first.name, first.network, first.way)]
        speeds = [f"{row.speed:.2f} × at batch {row.batch}{' in training' * row.train}" for row in alike]
        network = first.network.rpartition(":")[2]
        where = f"{first.device} ({first.name}, torch {first.torch}, {network} with {first.options}, {first.way})"
        said = f"{block}: not faster everywhere: on {where} its speed was {', '.join(speeds)}"
        yield f"{said}; `surgeon bench` measures yours"


def factor(of: Change) -> str:
    """Write by which factor a count changes, and from what to what: ×0.61 (4.09 G → 2.49 G)."""
    before, after = words.amount(of.before), words.amount(of.after)
    counts = f"({before} → {after})" if before != after else f"({before})"
    return f"×{of.after / of.before:.2f} {counts}" if of.before else counts


def in_words(time: Timed) -> str:
    """Write a measured ratio with its quartiles, and where it was measured; say where it is not reliable."""
    low, high = time.quartiles
    threads = f", {words.counted(time.threads, 'thread')}" if time.device == "cpu" else ""
    spread = f"quartiles {low:.2f} … {high:.2f}"
    milliseconds = f"{time.before * 1e3:.3g} → {time.after * 1e3:.3g} ms"
    doubt = "" if time.is_reliable else ": not reliable, close other programs and measure again"
    return f"×{time.ratio:.2f} ({milliseconds}; {spread}{doubt}; both fused, norms too; {time.device}{threads})"
