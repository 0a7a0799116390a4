"""What tuning measured: every block, the form that was kept, and the time of each form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line, Listing

if TYPE_CHECKING:
    from surgeon.surgery.tuned import Tuned, TunedBlock


def tuned_view(tuned: Tuned) -> RenderableType:
    """One row for each block; below, what that comes to, and where a block is slower than the conv it stands for."""
    if not tuned.blocks:
        return Line("tuned: no block is deployed in a form that could be chosen")
    table = words.table("block", "kind", "form", "ms in each form", "× plain", "ms of the conv", "× the conv")
    for one in tuned.blocks:
        table.add_row(
            one.path,
            one.block,
            one.form,
            ", ".join(f"{name} {_ms(seconds)}" for name, seconds in one.seconds.items()),
            f"{one.ratio:.2f}",
            "" if one.original is None else _ms(one.original),
            "" if one.to_original is None else f"{one.to_original:.2f}",
        )
    parts: list[RenderableType] = [table, Line(_sum(tuned))]
    if slower := [one for one in tuned.blocks if one.is_slower]:
        verb = "is" if len(slower) == 1 else "are"
        said = f"{words.counted(len(slower), 'block')} {verb} slower here, as deployed, than a conv like the original"
        parts.append(Listing(said, [one.path for one in slower], words.MOST_ROWS))
    return Group(*parts, *map(Line, _saves_nothing(tuned)))


def _sum(tuned: Tuned) -> str:
    """Say how many blocks are in another form, and what the network gains by it."""
    layout = ", channels_last" if tuned.channels_last else ""
    threads = f", {words.counted(tuned.threads, 'thread')}" if tuned.device == "cpu" else ""
    where = f"tuned on {tuned.device}{threads} at {tuned.input.replace(',', '×')}, {tuned.dtype}{layout}"
    others = [one for one in tuned.blocks if not one.is_plain]
    count = f"{len(others)} of {words.counted(len(tuned.blocks), 'block')}"
    if not others:
        return f"{where}: the plain form of every block is the fastest, or as fast as any"
    if tuned.is_undone:
        times = f"×{tuned.ratio:.2f}" if tuned.ratio is not None else "longer"
        return f"{where}: {count} would be faster alone, but the network takes {times}, so all stay in their plain form"
    gain = "" if tuned.ratio is None else f"; the network takes ×{tuned.ratio:.2f} of the time of plain forms"
    return f"{where}: {count} in another form than plain{gain}"


def _saves_nothing(tuned: Tuned) -> Iterator[str]:
    """Say for which blocks a conv with all multiply-adds is the fastest form."""
    found: dict[str, list[TunedBlock]] = {}
    for one in tuned.blocks if not tuned.is_undone else ():
        if one.is_original:
            found.setdefault(one.block, []).append(one)
    for block, ones in found.items():
        yield f"{block}: {_of(ones, tuned.blocks)} one dense conv here: the multiply-adds that it saves save no time"


def _of(ones: Sequence[TunedBlock], blocks: Sequence[TunedBlock]) -> str:
    alike = [one for one in blocks if one.block == ones[0].block]
    return f"{len(ones)} of {len(alike)} {'is' if len(ones) == 1 else 'are'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
