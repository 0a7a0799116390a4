"""Timings as one table for each setting, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.surgery.bench import Timing


def bench_view(timings: Sequence[Timing]) -> RenderableType:
    """One table per setting: what every model costs on paper and on the clock, and how reliable that is."""
    parts: list[RenderableType] = []
    for (setting, device), group in groupby(timings, key=lambda timing: (timing.setting, timing.device)):
        table = words.table(
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
                words.amount(one.macs),
                "" if one.macs_ratio is None else f"{one.macs_ratio:.3f}",
                f"{one.time_ratio:.3f}" + ("" if one.is_believable else " ?"),
                f"{low:.3f} … {high:.3f}",
                words.amount(one.peak_bytes, "B"),
            )
        parts += [Line(f"{setting}" + (f", {device}" if device != "cpu" else ""), "bold"), table]
    if doubtful := [one for one in timings if not one.is_believable]:
        names = ", ".join(dict.fromkeys(one.model for one in doubtful))
        line = f"? the spread is too wide to be reliable ({names}): close other programs, or pass more --rounds"
        parts.append(Line(line, "yellow"))
    note = "× compares with the first model in the same form; peak memory is what one run needs beyond the model"
    return Group(*parts, Line(note, "dim"))


def bench_data(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    return [asdict(one) | {"per_second": one.per_second, "believable": one.is_believable} for one in timings]
