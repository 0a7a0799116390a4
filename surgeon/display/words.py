"""What all tables share: how they look, and how counts, sizes and changes are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from surgeon.surgery.plan import Change

MOST_ROWS = 12  # of lists that could fill pages; JSON has all rows


class _Rows(Table):
    """A table that shows text as it is; rich would read text in brackets as colours."""

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        shown = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, style=style, end_section=end_section)


def table(*columns: str) -> Table:
    """Make an empty table, whose columns of numbers are aligned on the right."""
    numbers = {"parameters", "MACs", "activations", "calls", "isolated", "propagated", "stored, ulp", "max abs"}
    numbers |= {"max rel", "SQNR dB", "ms", "± %", "per second", "× MACs", "× time", "peak memory"}
    made = _Rows(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def convs(count: int) -> str:
    """Write how many convs."""
    return "1 conv" if count == 1 else f"{count} convs"


def size(of: tuple[int, int] | None) -> str:
    """Write height and width; nothing where they are not known."""
    return "" if of is None else f"{of[0]}×{of[1]}"


def amount(number: int | None, unit: str = "") -> str:
    """Write a count with three digits: 36.9 k, 25.6 M, 4.09 G; 3.21 MB with the unit B."""
    if number is None:
        return ""
    for prefix, unity in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unity:
            return f"{number / unity:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def change(of: Change | None, swap: str | None, unit: str = "") -> str:
    """Write a count before and after; only once for a conv that is not swapped, since it stays the same."""
    if of is None:
        return ""
    before, after = amount(of.before, unit), amount(of.after, unit)
    return f"{before} → {after}" if swap else before


def ratio(of: Change, unit: str = "") -> str:
    """Write a count before and after, and by which factor it changes."""
    times = f" (×{of.after / of.before:.2f})" if of.before else ""
    return f"{amount(of.before, unit)} → {amount(of.after, unit)}{times}"
