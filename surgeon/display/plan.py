"""A plan as a table: what every conv becomes, what that costs, and why the others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.gains import gain_lines
from surgeon.display.sheet import Line, Listing

if TYPE_CHECKING:
    from pathlib import Path

    from surgeon.surgery.plan import Entry, Plan

_BAKED = "their computed tensors become ordinary ones, with the values that they have in eval mode"
_MOST_NAMES = 3  # of the convs that stay, where not every conv is shown


def plan_view(
    plan: Plan, *, every_conv: bool = True, measured: Sequence[str] = (), written: Path | None = None
) -> RenderableType:
    """Show the swaps, and by reason which convs stay: all of them, or the first of each kind; and what is gained.

    `measured` are lines about the plan carried out, and `written` is where the plan, or what it made, lies.
    """
    parts: list[RenderableType] = [Line(plan.saves_little)] if plan.saves_little else []
    common = words.shared((entry.note or "", entry.path) for entry in plan.swaps)
    if plan.swaps:
        losses = {entry.path: _loses(entry) for entry in plan.swaps}
        shown = ["loses"] if any(losses.values()) else []
        table = words.table("conv", "geometry", "becomes", "parameters", "MACs", "activations", *shown, "remark")
        for entry in plan.swaps:
            *row, remark = _plan_row(entry, common)
            table.add_row(*row, *[losses[entry.path]] * bool(shown), remark)
        parts.append(table)
    most = None if every_conv else _MOST_NAMES
    for note, paths in common.items():
        if len(paths) == len(plan.swaps):
            parts.append(Line(f"all {words.convs(len(paths))} swapped: {note}"))
        else:
            parts.append(Listing(f"{words.convs(len(paths))} swapped: {note}", paths, most))
    if plan.baked:
        parts.append(Listing(f"{words.convs(len(plan.baked))} baked: {_BAKED}", plan.baked, most))
    for reason, paths in _by_reason((one.path, one.reason) for one in plan.unpermuted).items():
        parts.append(Listing(f"{words.convs(len(paths))} whose last channels are low: {reason}", paths, most))
    for reason, paths in _by_reason((entry.path, entry.skip) for entry in plan.convs).items():
        says = f"{words.convs(len(paths))} {'stays' if len(paths) == 1 else 'stay'}: {reason}"
        parts.append(Listing(says, paths, most))
    lines = [
        *_option_lines(plan),
        *_stream_lines(plan),
        *_budget_line(plan),
        _cost_line(plan),
        *measured,
        *gain_lines(plan),
    ]
    lines += [f"written: {written}"] if written is not None else []
    return Group(*parts, *map(Line, lines))


def _by_reason(said: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    """Group convs by the reason that is given for them; those without one are left out."""
    found: dict[str, list[str]] = {}
    for path, reason in said:
        if reason is not None:
            found.setdefault(reason, []).append(path)
    return found


def _plan_row(entry: Entry, common: Mapping[str, object]) -> tuple[str, ...]:
    remarks = [f"also named {', '.join(entry.aliases)}"] if entry.aliases else []
    remarks += [f"takes over {_beside(entry.path, entry.takes_norm[0])}"] if entry.takes_norm else []
    if entry.functional is not None:
        island = entry.functional.island or "the model itself"
        remarks.append(
            f"F.conv2d with {entry.functional.weight}; swapping it turns the forward of {island} into a graph"
        )
    note = None if entry.note in common else entry.note
    remarks += [said for said in (note, _kept(entry)) if said]
    return (
        entry.path,
        entry.conv,
        entry.swap or "",
        words.change(entry.params, entry.swap),
        words.change(entry.macs, entry.swap) + _ideal(entry.ideal_macs),
        words.change(entry.activations, entry.swap, "B"),
        "; ".join(remarks),
    )


def _loses(entry: Entry) -> str:
    """Say how far the outputs are with this swap alone, where that was measured for its setting."""
    options = {name: f"{value:g}" for name, value in entry.options.items() if isinstance(value, int | float)}
    found = {f"{name}: {value}" for name, value in options.items()} & (entry.loses or {}).keys()
    return f"{(entry.loses or {})[found.pop()]:.2g}" if found else ""


def _budget_line(plan: Plan) -> Iterator[str]:
    """Say what was measured of a plan that was chosen by what sites lose."""
    if (found := plan.budget) is None:
        return
    line = f"budget {found.asked}: " if found.asked else ""
    line += f"relative error of the outputs {found.predicted:.2g} predicted from single sites"
    if found.measured is not None:
        line += (
            f", {found.measured:.2g} measured, fitted to {found.images} images and judged on {found.held_back} others"
        )
    yield line


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
    """Say once how each kind of swap is done, and which options are not the same everywhere."""
    for block in dict.fromkeys(entry.swap for entry in plan.swaps):
        options = [entry.options for entry in plan.swaps if entry.swap == block]
        shared = {key: value for key, value in options[0].items() if all(one.get(key) == value for one in options)}
        yield f"{block}{f' ({_written(shared)})' if shared else ''}: {words.convs(len(options))}"
        ways = Counter(_written({key: one[key] for key in one if key not in shared}) for one in options)
        if len(ways) > 1:
            yield from (f"  {way or 'no other option'}: {words.convs(count)}" for way, count in ways.items())


def _written(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in options.items())


def _stream_lines(plan: Plan) -> Iterator[str]:
    """Say what is done besides the swaps of octave convs, and where their streams cannot go on."""
    if plan.permuted:
        count = sum(len(one.order) for one in plan.permuted)
        maps = words.counted(len(plan.permuted), "order")
        yield f"{maps} of channels permuted, {count} channels in all, so that those that lose least become low"
    for one in plan.low_passed:
        names = f"'{one.operand}', where '{one.step}' adds it to two streams"
        yield f"low-passed{_inside(one.island)}: {one.said or names}"
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
