"""A survey as a table of convs, and as data."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line, Listing

if TYPE_CHECKING:
    from surgeon.analysis.sites import Site, Survey


def survey_view(survey: Survey) -> RenderableType:
    """Show every conv, and what tracing could not follow."""
    table = words.table("conv", "geometry", "input", "calls", "parameters", "MACs", "activations", "read by", "remark")
    common = words.shared((_about(site), site.path) for site in survey.sites)
    for site in survey.sites:
        table.add_row(
            site.path,
            str(site.spec or site.kind),
            words.size(site.size),
            "?" if site.calls is None else str(site.calls),
            words.amount(site.cost.params),
            words.amount(site.cost.macs),
            words.amount(site.cost.activations, "B"),
            ", ".join(site.readers) or "?",
            _remark(site, common),
        )
    lines = [f"{words.convs(len(survey.sites))}, {words.amount(survey.cost.params)} parameters"]
    if survey.cost.macs is not None:
        written = words.amount(survey.cost.activations, "B")
        lines[0] += f", {words.amount(survey.cost.macs)} MACs and {written} of activations at {survey.inputs}"
    lines += [f"already in it: {count} {name}" for name, count in survey.blocks.items()]
    opaque = survey.opaque
    lines += [f"not traced: {part.path or 'the model itself'}: {part.reason}" for part in opaque[: words.MOST_ROWS]]
    lines += [f"not traced: {len(opaque) - words.MOST_ROWS} more; --json lists all"] * (len(opaque) > words.MOST_ROWS)
    groups = (Listing(f"{words.convs(len(paths))}: {about}", paths) for about, paths in common.items())
    return Group(table, *groups, *map(Line, lines))


def _remark(site: Site, common: Container[str]) -> str:
    """Say its other names, and what is said of it and not of several convs at once."""
    also = [f"also named {', '.join(site.paths[1:])}"] * (len(site.paths) > 1)
    about = _about(site)
    return "; ".join([*also, *[about] * (bool(about) and about not in common)])


def _about(site: Site) -> str:
    """Say why it cannot be swapped, or what is known of its norm."""
    return site.obstacle or (f"norm: {site.norm[0]}" if site.norm else site.norm_obstacle or "")


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
