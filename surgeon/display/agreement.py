"""What two classifiers make of the same images: accuracy, agreement, and the images on which they differ most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line, Sheet

if TYPE_CHECKING:
    from surgeon.proof.agreement import Agreement, Interval


def agreement_view(found: Agreement) -> RenderableType:
    """Say how far two models agree, then which images they differ on most."""
    worst = [_worst(found)] if found.worst else []
    return Group(*map(Line, agreement_lines(found)), *worst)


def agreement_lines(found: Agreement) -> Iterator[str]:
    """Say in sentences what was counted."""
    yield f"data: {found.source}, {found.preprocessing}"
    five = "" if found.top5_agreement is None else f"; A's class is among B's five best in {found.top5_agreement:.2%}"
    yield (
        f"agreement: the same class in {found.agreeing} of {found.items} {found.of} "
        f"({found.agreement:.2%}{_between(found.interval)}){five}"
    )
    if found.kl_mean is not None and found.kl_max is not None:
        yield f"KL(A‖B) over {found.classes} classes: mean {found.kl_mean:.2e}, at most {found.kl_max:.2e}"
    if found.odd:
        yield f"{found.odd} {found.of} have a score that is NaN: they count as different, and their KL is not known"
    if (known := found.labelled) is not None:
        sides = (("A", known.accuracy_a, known.interval_a), ("B", known.accuracy_b, known.interval_b))
        for name, share, interval in sides:
            yield f"accuracy of {name}: {share:.2%}{_between(interval)}"
        low, high = known.interval
        yield f"B − A: {known.difference:+.2%} (95 %: {low:+.2%} to {high:+.2%})"
        changed = known.lost + known.won + known.changed_wrong
        yield (
            f"changed predictions: {changed}, of which {known.lost} right → wrong, {known.won} wrong → right, "
            f"{known.changed_wrong} wrong → wrong"
        )
        yield f"paired test: {known.says}"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f", 95 %: {interval[0]:.2%} to {interval[1]:.2%}"


def _worst(found: Agreement) -> Sheet:
    is_map, has_labels = found.of == "pixels", any(one.label is not None for one in found.worst)
    titles = ["pixels that differ"] if is_map else ["class in A", "class in B", *["label"] * has_labels]
    table = words.table("differs most", "KL", *titles)
    for one in found.worst:
        classes = [one.differing] if is_map else [one.a, one.b, *[one.label] * has_labels]
        cells = ["" if value is None else str(value) for value in classes]
        table.add_row(one.name, "NaN" if one.kl is None else f"{one.kl:.2e}", *cells)
    return table
