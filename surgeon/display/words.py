"""What all tables share: how they look, and how counts, sizes and changes are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from surgeon.display.sheet import Column, Sheet

if TYPE_CHECKING:
    from surgeon.surgery.plan import Change

_SHORT = 40  # columns that a sentence may take in every row
MOST_ROWS = 12  # of lists that could fill pages; JSON has all rows


_NUMBERS = {"loses", "parameters", "MACs", "activations", "calls", "isolated", "propagated", "stored, ulp", "max abs"}
_NUMBERS |= {
    "max rel",
    "SQNR dB",
    "ms",
    "± %",
    "per second",
    "× MACs",
    "× time",
    "peak memory",
    "error before",
    "error after",
}
_NUMBERS |= {"same class", "relative L2", "accuracy"}
_TEXTS = {"geometry": "", "read by": "read by ", "remark": ""}  # and what they begin with below their row
_PROSE = {"meaning", "what it does"}


def table(*columns: str) -> Sheet:
    """Make an empty table, whose columns of numbers are aligned on the right."""
    return Sheet([_column(title) for title in columns])


def _column(title: str) -> Column:
    if title in _PROSE:
        return Column(title, "", is_text=True, is_prose=True)
    return Column(title, _TEXTS.get(title, f"{title} "), is_number=title in _NUMBERS, is_text=title in _TEXTS)


def shared(said: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Find the sentences that are said of several convs, to say them once with the names; short ones may repeat.

    >>> shared([("a sentence that would fill its column in every row", name) for name in ("one", "two")])
    {'a sentence that would fill its column in every row': ['one', 'two']}
    """
    found: dict[str, list[str]] = {}
    for sentence, name in said:
        found.setdefault(sentence, []).append(name)
    return {sentence: names for sentence, names in found.items() if len(names) > 1 and len(sentence) > _SHORT}


def convs(count: int) -> str:
    """Write how many convs."""
    return counted(count, "conv")


def counted(count: int, thing: str) -> str:
    """Write how many of a thing.

    >>> counted(1, "block"), counted(2, "block")
    ('1 block', '2 blocks')
    """
    return f"1 {thing}" if count == 1 else f"{count} {thing}s"


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
