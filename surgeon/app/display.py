"""Surveys, plans and reports → tables for a terminal, and plain data for JSON. The only file that knows colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.analysis.sites import Survey
from surgeon.app.bench import Timing
from surgeon.app.commands import Converted, Fused
from surgeon.app.demo.run import Demo
from surgeon.blocks import Block
from surgeon.proof.verify import Report, SiteDistance
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.plan import Change, Entry, Plan

_VERDICTS = {
    "equivalent": ("bold green", "equivalent: B computes what A computes"),
    "different": ("bold red", "different: B does not compute what A computes"),
    "approximate": ("bold yellow", "approximate by design: these are distances, and no proof that B equals A"),
}
_MOST_ROWS = 12  # of what could go on for pages; JSON has all of it


def survey_view(survey: Survey) -> RenderableType:
    """List every conv, and what tracing could not follow."""
    table = _table("conv", "geometry", "input", "calls", "parameters", "MACs", "activations", "read by", "remark")
    for site in survey.sites:
        table.add_row(
            "\n".join(site.paths),
            str(site.spec or site.kind),
            _size(site.size),
            "?" if site.calls is None else str(site.calls),
            _amount(site.cost.params),
            _amount(site.cost.macs),
            _amount(site.cost.activations, "B"),
            ", ".join(site.readers) or "?",
            site.obstacle or (f"norm: {site.norm[0]}" if site.norm else site.norm_obstacle or ""),
        )
    lines = [f"{_convs(len(survey.sites))}, {_amount(survey.cost.params)} parameters"]
    if survey.cost.macs is not None:
        written = _amount(survey.cost.activations, "B")
        lines[0] += f", {_amount(survey.cost.macs)} MACs and {written} of activations at {survey.inputs}"
    lines += [f"already in it: {count} {name}" for name, count in survey.blocks.items()]
    opaque = survey.opaque
    lines += [f"not traced: {part.path or 'the model itself'}: {part.reason}" for part in opaque[:_MOST_ROWS]]
    lines += [f"not traced: {len(opaque) - _MOST_ROWS} more; --json lists all"] * (len(opaque) > _MOST_ROWS)
    return Group(table, *map(_plain, lines))


def survey_data(survey: Survey) -> dict[str, Any]:
    return {
        "model": survey.fingerprint,
        "input": (survey.inputs.record or survey.inputs.text) if survey.inputs else None,
        "cost": asdict(survey.cost),
        "blocks": survey.blocks,
        "not_traced": [asdict(opaque) for opaque in survey.opaque],
        "convs": [
            {
                "paths": site.paths,
                "kind": site.kind,
                "spec": asdict(site.spec) if site.spec else None,
                "calls": site.calls,
                "shapes": [asdict(call) for call in site.runs],
                "readers": site.readers,
                "norm": site.norm,
                "norm_obstacle": site.norm_obstacle,
                "obstacle": site.obstacle,
                "cost": asdict(site.cost),
            }
            for site in survey.sites
        ],
    }


def plan_view(plan: Plan, *, every_conv: bool = True) -> RenderableType:
    """List what happens to every conv; or only the swaps, with the skips counted by reason."""
    table = _table("conv", "geometry", "becomes", "parameters", "MACs", "activations", "why, and what to know")
    for entry in plan.convs if every_conv else plan.swaps:
        table.add_row(*_plan_row(entry))
    skips = sorted((entry.skip or "", entry.path) for entry in plan.convs if entry.skip)
    for reason, group in groupby(() if every_conv else skips, key=lambda skip: skip[0]):
        paths = [path for _, path in group]
        shown = ", ".join(paths[:2]) + (", …" if len(paths) > 2 else "")
        table.add_row(shown, _convs(len(paths)), "stays", "", "", "", reason, style="dim")
    return Group(table, *map(_plain, [*_option_lines(plan), *_stream_lines(plan), _cost_line(plan)]))


def converted_view(converted: Converted) -> RenderableType:
    """The plan in short, the costs, and what was measured."""
    check, lines = converted.check, []
    if check.worst is not None:
        kept = check.sites - check.approximate
        lines.append(
            f"self-check: {kept} swapped convs against what stood there, in float64: worst relative L2 "
            f"{check.worst:.1e} ({check.worst_path})"
        )
    if check.approximate:
        lines.append(
            f"{_convs(check.approximate)} swapped for what computes something else, as the recipe says: train on"
        )
    if check.streams is not None:
        lines.append(f"without seams against conv by conv, in float64: relative L2 {check.streams:.1e}")
    if check.whole is not None:
        lines.append(f"whole network, before and after, in its own dtype: relative L2 {check.whole:.1e}")
    lines.append(f"written: {converted.path}")
    return Group(plan_view(converted.plan, every_conv=False), *map(_plain, lines))


def converted_data(converted: Converted) -> dict[str, Any]:
    return {
        "path": str(converted.path),
        "self_check": asdict(converted.check),
        "plan": converted.plan.to_dict(),
    }


def fused_view(fused: Fused) -> RenderableType:
    before, after = fused.params
    lines = [f"folded: {len(fused.folded)} blocks, {_amount(before)} → {_amount(after)} parameters"]
    if fused.distance is not None:
        lines.append(f"whole network, before and after, in its own dtype: relative L2 {fused.distance:.1e}")
    return Group(*map(_plain, [*lines, f"written: {fused.path}"]))


def fused_data(fused: Fused) -> dict[str, Any]:
    return {**asdict(fused), "path": str(fused.path), "params": {"before": fused.params[0], "after": fused.params[1]}}


def report_view(report: Report) -> RenderableType:
    """The checks, the distances, the sites, and the verdict last."""
    parts: list[RenderableType] = [
        Text.assemble(("  ok  ", "green") if check.passed else (" FAIL ", "bold red"), f"{check.name}: {check.says}")
        for check in report.checks
    ]
    parts += [_distances(report)] if report.distances else []
    if rows := list(_telling(report.sites)):
        parts.append(_sites(rows, len(report.sites)))
    if report.first_to_part:
        parts.append(Text(f"first to part: {report.first_to_part}", style="red"))
    parts += [Text(remark, style="red") for remark in report.remarks]
    style, words = _VERDICTS[report.verdict]
    return Group(*parts, Text(words, style=style))


def _plan_row(entry: Entry) -> tuple[str, ...]:
    remarks = [f"takes over {_beside(entry.path, entry.takes_norm[0])}"] if entry.takes_norm else []
    if entry.functional is not None and entry.swap:
        island = entry.functional.island or "the model itself"
        remarks.append(f"F.conv2d with {entry.functional.weight}; for it the forward of {island} becomes a graph")
    remarks += [text for text in (entry.note, _kept(entry), entry.skip) if text]
    return (
        "\n".join(entry.paths),
        entry.conv,
        entry.swap or "stays",
        _change(entry.params, entry.swap),
        _change(entry.macs, entry.swap) + _ideal(entry.ideal_macs),
        _change(entry.activations, entry.swap, "B"),
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
        yield f"{block}{f' ({options})' if options else ''}: {_convs(count)}"


def _stream_lines(plan: Plan) -> Iterator[str]:
    """Say what is done beside the swaps of octave convs, and where their streams cannot go on."""
    for one in plan.low_passed:
        yield f"low-passed: '{one.operand}'{_inside(one.island)}, where '{one.step}' adds it to two streams"
    if plan.rewritten:
        named = ", ".join(path or "the model itself" for path in plan.rewritten[:3])
        more = f" and {len(plan.rewritten) - 3} more" if len(plan.rewritten) > 3 else ""
        yield f"two streams go from conv to conv; for that the forward of {named}{more} becomes a graph"
    kinds = {"join": "two streams are joined", "split": "a map is split", "local": "every conv splits and joins"}
    shown = plan.seams[:_MOST_ROWS]
    yield from (f"seam: {kinds[one.kind]}{_inside(one.island)}: {one.reason}" for one in shown)
    if len(plan.seams) > len(shown):
        yield f"seam: {len(plan.seams) - len(shown)} more; --json lists all"
    if plan.rewritten and not plan.seams:
        yield "no seam is left"


def _inside(island: str) -> str:
    return f" in {island}" if island else ""


def _cost_line(plan: Plan) -> str:
    swaps, total = len(plan.swaps), plan.total
    line = f"{swaps} of {_convs(len(plan.convs))} swapped; parameters {_ratio(total.params)}"
    if total.macs and plan.inputs:
        line += f"; MACs {_ratio(total.macs)}{_ideal(total.ideal_macs)}"
        line += f"; activations {_ratio(total.activations, 'B')}" if total.activations else ""
        line += f" at {plan.inputs}"
    return line


def _distances(report: Report) -> Table:
    table = _table("input", "float64", report.dtype, "max abs", "max rel", "SQNR dB", "cosine", "top-1 same")
    for row in report.distances:
        top1 = "" if row.top1 is None else f"{row.top1:.1%}"
        distances = (row.float64, row.own, row.max_abs, row.max_rel)
        numbers = ["" if n is None else f"{n:.1e}" for n in distances]
        table.add_row(row.input, *numbers, f"{row.sqnr_db:.1f}", f"{row.cosine:.9f}", top1)
    return table


def _telling(sites: Sequence[SiteDistance]) -> Iterator[SiteDistance]:
    """Choose the sites worth a row: those that part, and those that are another module now."""
    for site in sites:
        if site.parts or site.kind_a != site.kind_b:
            yield site


def _sites(rows: Sequence[SiteDistance], count: int) -> Table:
    table = _table("site", "A", "B", "isolated", "propagated", "stored, ulp", "")
    parting = [site for site in rows if site.parts]
    shown = (parting or rows)[:_MOST_ROWS]
    for site in shown:
        ulps = "" if site.ulps is None else f"{site.ulps:.3g}"
        distances = (f"{site.isolated:.1e}", f"{site.propagated:.1e}")
        mark = Text("parts", style="red") if site.parts else ""
        table.add_row(site.path, site.kind_a, site.kind_b, *distances, ulps, mark)
    if len(shown) < len(rows):
        table.caption = f"{len(shown)} of {len(rows)} sites; --json lists all {count}"
    return table


def _table(*columns: str) -> Table:
    numbers = {"parameters", "MACs", "activations", "calls", "isolated", "propagated", "stored, ulp", "max abs"}
    numbers |= {"max rel", "SQNR dB", "ms", "± %", "per second", "× MACs", "× time", "peak memory"}
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _plain(line: str) -> RenderableType:
    return Text(line)


def _convs(count: int) -> str:
    return "1 conv" if count == 1 else f"{count} convs"


def _size(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[0]}×{size[1]}"


def _change(change: Change | None, swap: str | None, unit: str = "") -> str:
    if change is None:
        return ""
    before, after = _amount(change.before, unit), _amount(change.after, unit)
    return f"{before} → {after}" if swap else before


def _ideal(macs: int | None) -> str:
    return "" if macs is None else f" (paper: {_amount(macs)})"


def _ratio(change: Change, unit: str = "") -> str:
    ratio = f" (×{change.after / change.before:.2f})" if change.before else ""
    return f"{_amount(change.before, unit)} → {_amount(change.after, unit)}{ratio}"


def _amount(number: int | None, unit: str = "") -> str:
    """Write a count with three digits: 36.9 k, 25.6 M, 4.09 G; 3.21 MB with the unit B."""
    if number is None:
        return ""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def bench_view(timings: Sequence[Timing]) -> RenderableType:
    """One table per setting: what every model costs on paper and on the clock, and how much of that to believe."""
    parts: list[RenderableType] = []
    for setting, group in groupby(timings, key=lambda timing: timing.setting):
        table = _table(
            "model", "form", "ms", "± %", "per second", "MACs", "× MACs", "× time", "quartiles", "peak memory"
        )
        for one in group:
            low, high = one.quartiles
            table.add_row(
                one.model,
                one.form,
                f"{one.seconds * 1e3:.3g}",
                f"{one.spread * 100:.0f}",
                f"{one.per_second:.3g}",
                _amount(one.macs),
                "" if one.macs_ratio is None else f"{one.macs_ratio:.3f}",
                f"{one.time_ratio:.3f}" + ("" if one.is_believable else " ?"),
                f"{low:.3f} … {high:.3f}",
                _amount(one.peak_bytes, "B"),
            )
        parts += [Text(str(setting), style="bold"), table]
    if doubtful := [one for one in timings if not one.is_believable]:
        names = ", ".join(dict.fromkeys(one.model for one in doubtful))
        line = f"? the spread is too wide to believe ({names}): close other programs, or give more --rounds"
        parts.append(Text(line, style="yellow"))
    note = "× is to the first model in the same form; memory is what one run needs beyond the model"
    return Group(*parts, Text(note, style="dim"))


def bench_data(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    return [asdict(one) | {"per_second": one.per_second, "believable": one.is_believable} for one in timings]


def recipes_view(recipes: Sequence[Recipe]) -> RenderableType:
    table = _table("recipe", "what it does", "source")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.title, recipe.cites or "")
    return Group(table, Text("`surgeon recipes NAME` prints one; a copy of it is a start for your own"))


def recipes_data(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [
        {"name": recipe.name, "title": recipe.title, "cites": recipe.cites, "text": recipe.text} for recipe in recipes
    ]


def blocks_view(blocks: Mapping[str, type[Block]]) -> RenderableType:
    parts: list[RenderableType] = []
    for name, block in blocks.items():
        parts.append(Text.assemble((name, "bold"), f": {block.title}\n  {block.paper}"))
        table = _table("  option", "default", "meaning")
        for option, field in block.Options.model_fields.items():
            table.add_row(f"  {option}", str(field.default), field.description or "")
        parts.append(table)
    return Group(*parts)


def blocks_data(blocks: Mapping[str, type[Block]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "title": block.title, "paper": block.paper, "options": block.Options.model_json_schema()}
        for name, block in blocks.items()
    ]


def demo_view(demo: Demo) -> RenderableType:
    train, test = demo.images
    table = _table("step", "file", f"right of {test} test images", "parameters", "MACs")
    for step in demo.steps:
        table.add_row(step.name, step.file, f"{step.accuracy:.1%}", _amount(step.params), _amount(step.macs))
    note = (
        f"Fashion-MNIST, {train} images to train on, {test} others to test on: it shows the path, and ranks no methods"
    )
    heading = Text("\nthe folded network against the trained one:")
    return Group(table, Text(note, style="dim"), heading, report_view(demo.report))


def demo_data(demo: Demo) -> dict[str, Any]:
    return {**asdict(demo), "report": demo.report.to_dict()}
