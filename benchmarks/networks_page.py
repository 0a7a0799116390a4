"""networks.json → the measured part of docs/networks.md, between its two markers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN = "<!-- measured: python benchmarks/networks.py writes what is between these lines -->"
END = "<!-- end of what is measured -->"
HEADS = ("recipe", "convs", "function", "parameters", "multiply-adds", "in training", "time", "quartiles")


def write(results: Mapping[str, Any]) -> None:
    """Put what was measured into the page."""
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_results(text: str, results: Mapping[str, Any]) -> str:
    """Replace what is between the markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}")
    lines = [*overview(results), *(line for name, one in results.items() for line in section(name, one))]
    return "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"])


def overview(results: Mapping[str, Any]) -> Iterator[str]:
    """One row for each network: what it costs, and what three recipes make of it."""
    yield from ("| network | multiply-adds | ms | acnet | hetconv-p4 | octave |", "|---|---|---|---|---|---|")
    for name, one in results.items():
        cells = [_in_short(one["recipes"].get(recipe)) for recipe in ("acnet", "hetconv-p4", "octave")]
        milliseconds = "" if one["ms"] is None else f"{one['ms']:.0f}"
        yield f"| {name.partition(':')[2]} | {one['macs'] / 1e9:.2f} G | {milliseconds} | {' | '.join(cells)} |"
    yield ""


def _in_short(row: Mapping[str, Any] | None) -> str:
    """Write the multiply-adds, and the time where it was measured."""
    if row is None or not row["swapped"]:
        return "swaps nothing"
    return f"×{row['macs']:.2f}" + (f", time ×{row['time']:.2f}{_doubt(row)}" if "time" in row else "")


def section(name: str, one: Mapping[str, Any]) -> Iterator[str]:
    """The table of one network, and which recipes swap nothing in it."""
    built = ", ".join(f"{key}={value}" for key, value in one["arguments"].items())
    yield from (f"### {name.partition(':')[2]}", "")
    cost = f"{one['convs']} convs, {one['params'] / 1e6:.1f} M parameters, {one['macs'] / 1e9:.2f} G multiply-adds"
    yield f"`{name}`{f' ({built})' if built else ''} at {one['input']}: {cost}. {_how(one)}"
    yield from ("", f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}")
    for recipe, row in one["recipes"].items():
        if row["swapped"]:
            yield f"| {' | '.join(_cells(recipe, row, one['convs']))} |"
    for why, names in _idle(one).items():
        yield from ("", f"Nothing is swapped by {', '.join(names)}: {why}.")
    yield ""


def _idle(one: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the recipes that swap nothing by the main reason."""
    found: dict[str, list[str]] = {}
    for recipe, row in one["recipes"].items():
        if not row["swapped"]:
            found.setdefault(row["why"], []).append(f"`{recipe}`")
    return found


def _how(one: Mapping[str, Any]) -> str:
    if one["ms"] is None:
        return "Not timed."
    threads = f"{one['threads']} thread{'s' * (one['threads'] > 1)}"
    run = f"{one['ms']:.1f} ms as it is, with its norms folded; {threads} of {one['machine']}, one image"
    return f"{run}, median of {one['rounds']} rounds, torch {one['versions']['torch']}."


def _cells(recipe: str, row: Mapping[str, Any], convs: int) -> Iterator[str]:
    yield from (f"`{recipe}`", f"{row['swapped']} of {convs}", _function(row))
    for key in ("params", "macs", "training_macs"):
        yield "" if row[key] is None else f"×{row[key]:.2f}"
    if "time" not in row:
        yield from ("", "")
        return
    low, high = row["quartiles"]
    yield from (f"×{row['time']:.2f}{_doubt(row)}", f"{low:.2f} … {high:.2f}")


def _doubt(row: Mapping[str, Any]) -> str:
    return "" if row["reliable"] else " ?"


def _function(row: Mapping[str, Any]) -> str:
    if not row["keeps_function"]:
        return "approximated"
    if row["exact"] == row["swapped"]:
        return "kept"
    return f"kept; {row['swapped'] - row['exact']} in eval mode only"
