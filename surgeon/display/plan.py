"""A plan as a table: what every conv becomes, what that costs, and why the others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.display import words

if TYPE_CHECKING:
    from surgeon.surgery.plan import Entry, Plan


def plan_view(plan: Plan, *, every_conv: bool = True) -> RenderableType:
    """List what happens to every conv; or only the swaps, with the skips counted by reason."""
    table = words.table("conv", "geometry", "becomes", "parameters", "MACs", "activations", "why, and what to know")
    for entry in plan.convs if every_conv else plan.swaps:
        table.add_row(*_plan_row(entry))
    skips = sorted((entry.skip or "", entry.path) for entry in plan.convs if entry.skip)
    for reason, group in groupby(() if every_conv else skips, key=lambda skip: skip[0]):
        paths = [path for _, path in group]
        shown = ", ".join(paths[:2]) + (", …" if len(paths) > 2 else "")
        table.add_row(shown, words.convs(len(paths)), "stays", "", "", "", reason, style="dim")
    return Group(table, *map(Text, [*_option_lines(plan), *_stream_lines(plan), _cost_line(plan)]))


def _plan_row(entry: Entry) -> tuple[str, ...]:
    remarks = [f"takes over {_beside(entry.path, entry.takes_norm[0])}"] if entry.takes_norm else []
    if entry.functional is not None and entry.swap:
        island = entry.functional.island or "the model itself"
        remarks.append(
            f"F.conv2d with {entry.functional.weight}; swapping it turns the forward of {island} into a graph"
        )
    remarks += [text for text in (entry.note, _kept(entry), entry.skip) if text]
    return (
        "\n".join(entry.paths),
        entry.conv,
        entry.swap or "stays",
        words.change(entry.params, entry.swap),
        words.change(entry.macs, entry.swap) + _ideal(entry.ideal_macs),
        words.change(entry.activations, entry.swap, "B"),
        "; ".join(remarks),
    )


def _kept(entry: Entry) -> str | None:
    """Say how much of what a conv has learnt a swap keeps, in the words of its block."""
    if entry.kept_energy is None or entry.swap is None:
        return None
    return entry.block.kept_in_words(entry.kept_energy, entry.block_options)


def _beside(path: str, other: str) -> str:
    """Shorten the name of a module that has the same parent."""
    parent = path.rpartition(".")[0]
    short = other.removeprefix(f"{parent}.")
    return short if parent == other.rpartition(".")[0] and not short.isdigit() else other


def _option_lines(plan: Plan) -> Iterator[str]:
    """Say once how each kind of swap is done."""
    ways = Counter((entry.swap, ", ".join(f"{k}: {v}" for k, v in entry.options.items())) for entry in plan.swaps)
    for (block, options), count in ways.items():
        yield f"{block}{f' ({options})' if options else ''}: {words.convs(count)}"


def _stream_lines(plan: Plan) -> Iterator[str]:
    """Say what is done besides the swaps of octave convs, and where their streams cannot go on."""
    for one in plan.low_passed:
        yield f"low-passed: '{one.operand}'{_inside(one.island)}, where '{one.step}' adds it to two streams"
    if plan.rewritten:
        named = ", ".join(path or "the model itself" for path in plan.rewritten[:3])
        more = f" and {len(plan.rewritten) - 3} more" if len(plan.rewritten) > 3 else ""
        yield f"two streams go from conv to conv; this turns the forward of {named}{more} into a graph"
    kinds = {"join": "two streams are joined", "split": "a map is split", "local": "every conv splits and joins"}
    shown = plan.seams[: words.MOST_ROWS]
    yield from (f"seam: {kinds[one.kind]}{_inside(one.island)}: {one.reason}" for one in shown)
    if len(plan.seams) > len(shown):
        yield f"seam: {len(plan.seams) - len(shown)} more; --json lists all"
    if plan.rewritten and not plan.seams:
        yield "no seam is left"


def _inside(island: str) -> str:
    return f" in {island}" if island else ""


def _cost_line(plan: Plan) -> str:
    swaps, total = len(plan.swaps), plan.total
    line = f"{swaps} of {words.convs(len(plan.convs))} swapped; parameters {words.ratio(total.params)}"
    if total.macs and plan.inputs:
        line += f"; MACs {words.ratio(total.macs)}{_ideal(total.ideal_macs)}"
        line += f"; activations {words.ratio(total.activations, 'B')}" if total.activations else ""
        line += f" at {plan.inputs}"
    return line


def _ideal(macs: int | None) -> str:
    return "" if macs is None else f" (paper: {words.amount(macs)})"
