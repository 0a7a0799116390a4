"""fit.json → the measured part of docs/fit.md, between its two markers, and its two pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fit_plots import Line, Panel, picture

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "fit.md"
PICTURES = DOCS / "images"
BEGIN = "<!-- measured: python benchmarks/fit.py writes what is between these lines -->"
END = "<!-- end of what is measured -->"
BLOCKS = {"hetconv": "HetConv", "octave": "Octave"}
STAGES = {
    "project": ("as converted", "#999999", "circle"),
    "norms": ("norms estimated anew", "#b8860b", "triangle"),
    "labels": ("trained with labels, same time", "#c0392b", "diamond"),
    "fit": ("fit", "#1f6fb2", "square"),
    "distil": ("fit and 200 steps of distilling", "#1b7f4d", "circle"),
}
BUDGET_HEADS = (
    *("block, budget", "what", "multiply-adds", "fit: accuracy", "agreement, L2"),
    *("distilled: accuracy", "agreement, L2", "seconds: choosing / fit / fit and distilling"),
)
Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def write(results: Mapping[str, Any]) -> None:
    """Put what was measured into the page, and draw the pictures."""
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, text in pictures(results).items():
        (PICTURES / name).write_text(text, encoding="utf-8")


def with_results(text: str, results: Mapping[str, Any]) -> str:
    """Replace what is between the markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}")
    lines = [*_networks(results["networks"]), *_sites(results), *_budgets(results)]
    return "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"])


def pictures(results: Mapping[str, Any]) -> dict[str, str]:
    """Draw both tables."""
    networks, rows = results["networks"], results["rows"]
    sites = [_sites_panel(name, block, networks[name], rows) for block in BLOCKS for name in _in_order(networks)]
    budgets = [_budget_panel(name, block, networks[name], rows) for block in BLOCKS for name in _in_order(networks)]
    return {
        "fit-sites.svg": picture(sites, 3, "Errors by multiply-adds, every site but the stem converted alike"),
        "fit-budget.svg": picture(budgets, 4, "Errors by multiply-adds, chosen by a budget or uniform"),
    }


def in_short(found: Row) -> str:
    """One line about a row, for the one who waits."""
    ways = found.get("ways", [found])
    shown = [
        f"×{one['macs']:.2f} "
        + ", ".join(f"{name} {one['stages'][name]['accuracy']:.1%}" for name in STAGES if name in one["stages"])
        for one in ways
    ]
    return "; ".join(shown) or "no uniform way costs as much"


def of(rows: Rows, table: str, name: str, block: str) -> list[tuple[str, Row]]:
    """The rows of one table, network and block, dearest first, as the value and what was found."""
    start = f"{table}/{name}/{block}/"
    found = [(key.removeprefix(start), row) for key, row in rows.items() if key.startswith(start)]
    return sorted(found, key=lambda one: float(one[0]), reverse=table != "sites")


def best(row: Row, stage: str) -> Row | None:
    """Of the uniform ways of one cost, the one that is most accurate after a stage."""
    ways = (way for way in row.get("ways", ()) if stage in way["stages"])
    return max(ways, key=lambda way: way["stages"][stage]["accuracy"], default=None)


def _in_order(networks: Mapping[str, Any]) -> list[str]:
    return [name for name in ("demo", "wide", "vgg", "deep") if name in networks]


def _networks(networks: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| network | what | pixels | parameters | multiply-adds | test accuracy |", "|---|---|---|---|---|---|")
    for name in _in_order(networks):
        one = networks[name]
        cost = f"{one['params'] / 1e6:.2f} M | {one['macs'] / 1e6:.1f} M"
        yield f"| {name} | {one['words']} | {one['pixels']} | {cost} | {one['accuracy']:.2%} |"
    yield ""


def _sites(results: Mapping[str, Any]) -> Iterator[str]:
    yield from ("### Every site alike", "", "![errors by multiply-adds](images/fit-sites.svg)", "")
    for name in _in_order(results["networks"]):
        found = [
            (f"{BLOCKS[block]} {'P' if block == 'hetconv' else 'α'} = {value}", row)
            for block in BLOCKS
            for value, row in of(results["rows"], "sites", name, block)
        ]
        if found:
            yield from _sites_table(name, results["networks"][name], found)


def _sites_table(name: str, network: Row, found: list[tuple[str, Row]]) -> Iterator[str]:
    yield f"**{name}**, {network['accuracy']:.2%} as it is. Accuracy on the 10,000 test images, %:"
    heads = ("", "sites", "multiply-adds", *(words for words, _, _ in STAGES.values()))
    yield from ("", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}")
    for words, row in found:
        cells = [f"{100 * row['stages'][stage]['accuracy']:.1f}" for stage in STAGES]
        yield f"| {words} | {row['convs']} of {row['of']} | ×{row['macs']:.2f} | {' | '.join(cells)} |"
    yield from ("", "Agreement with the original, relative L2 of the logits, and seconds:", "")
    heads = ("", "as converted", "fit", "fit and distilling", "labels: images seen, rate")
    yield from (f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}")
    for words, row in found:
        stages = row["stages"]
        control = f"{_beside(stages['labels'])}, {stages['labels']['images']:,}, {stages['labels']['rate']:g}"
        cells = [_beside(stages[stage]) for stage in ("project", "fit", "distil")]
        yield f"| {words} | {' | '.join(cells)} | {control} |"
    yield from ("", _measured_on(row for _, row in found), "")


def _beside(stage: Row) -> str:
    """Say how near a network is to the original, and how long it took."""
    took = f", {stage['seconds']:.0f} s" if "seconds" in stage else ""
    return f"{stage['agreement']:.1%}, {stage['distance']:.2f}{took}"


def _measured_on(rows: Iterator[Row]) -> str:
    places = {}
    for row in rows:
        threads = row["where"]["threads"]
        with_threads = "" if threads is None else f" ({threads} thread{'s' * (threads > 1)})"
        places[f"{row['where']['device']}{with_threads}, torch {row['where']['torch']}"] = None
    return f"Measured on {'; '.join(places)}."


def _budgets(results: Mapping[str, Any]) -> Iterator[str]:
    rows = results["rows"]
    yield from (
        "### A budget, and as uniform as costs as much",
        "",
        "![errors by multiply-adds](images/fit-budget.svg)",
        "",
    )
    yield from _score(rows)
    for name in _in_order(results["networks"]):
        if any(of(rows, "budget", name, block) for block in BLOCKS):
            yield from _budget_table(name, results["networks"][name], rows)


def _score(rows: Rows) -> Iterator[str]:
    """Count where a budget is better than every uniform way of its cost."""
    for stage, words in (("fit", "After fitting"), ("distil", "After 300 steps of distilling")):
        pairs = [(row, rows.get(key.replace("budget/", "uniform/", 1), {})) for key, row in rows.items()]
        against = [
            (row["stages"][stage]["accuracy"], way["stages"][stage]["accuracy"])
            for row, other in pairs
            if "stages" in row and (way := best(other, stage)) is not None
        ]
        if against:
            wins = sum(one > other for one, other in against)
            ties = sum(one == other for one, other in against)
            equal = f", and as good at {ties}" if ties else ""
            yield f"{words} the budget is better than the best uniform way at {wins} of {len(against)} points{equal}."
    yield ""


def _budget_table(name: str, network: Row, rows: Rows) -> Iterator[str]:
    yield from (f"**{name}**, {network['accuracy']:.2%} as it is:", "")
    yield from (f"| {' | '.join(BUDGET_HEADS)} |", f"|{'---|' * len(BUDGET_HEADS)}")
    for block, words in BLOCKS.items():
        for value, row in of(rows, "budget", name, block):
            yield _budget_row(f"{words} ×{value}", row, _chosen(row))
            uniform = rows.get(f"uniform/{name}/{block}/{value}")
            if uniform is not None:
                way = best(uniform, "distil") or {"refused": "no uniform way costs as much"}
                yield _budget_row("", way, f"uniform: {way.get('words')}")
    shown = [row for block in BLOCKS for _, row in of(rows, "budget", name, block)]
    yield from ("", _measured_on(iter(shown)), "")


def _budget_row(head: str, row: Row, what: str) -> str:
    if "stages" not in row:
        why = " ".join(row["refused"].replace("|", "/").split())
        return f"| {head} | {why} |{'  |' * (len(BUDGET_HEADS) - 2)}"
    fitted, distilled = row["stages"]["fit"], row["stages"]["distil"]
    cells = [cell for stage in (fitted, distilled) for cell in (f"{100 * stage['accuracy']:.2f}", _near(stage))]
    took = [row["plan_seconds"]] if "plan_seconds" in row else []
    took += [fitted["seconds"], distilled["seconds"]]
    seconds = " / ".join(f"{one:.0f}" for one in took)
    return f"| {head} | {what} | ×{row['macs']:.3f} | {' | '.join(cells)} | {seconds} |"


def _near(stage: Row) -> str:
    return f"{stage['agreement']:.1%}, {stage['distance']:.3f}"


def _chosen(row: Row) -> str:
    """Say what a budget chose."""
    stays = row.get("of", 0) - row.get("convs", 0)
    counts = [*(f"{count} × {words}" for words, count in row.get("chosen", {}).items()), f"{stays} stay"]
    return ", ".join(counts)


def _sites_panel(name: str, block: str, network: Row, rows: Rows) -> Panel:
    found = [row for _, row in of(rows, "sites", name, block)]
    lines = tuple(
        Line(words, colour, [_point(row, stage) for row in found], marker)
        for stage, (words, colour, marker) in STAGES.items()
    )
    return Panel(f"{name}, {BLOCKS[block]}", 1 - network["accuracy"], lines)


def _budget_panel(name: str, block: str, network: Row, rows: Rows) -> Panel:
    chosen = [row for _, row in of(rows, "budget", name, block) if "stages" in row]
    lines = []
    for stage, words, colour in (("fit", "fit", "#1f6fb2"), ("distil", "fit and 300 steps", "#1b7f4d")):
        others = [way for _, row in of(rows, "uniform", name, block) if (way := best(row, stage)) is not None]
        points = [_point(way, stage) for way in others]
        lines.append(Line(f"uniform, {words}", colour, points, "diamond", dashed=True))
        lines.append(Line(f"budget, {words}", colour, [_point(row, stage) for row in chosen], "circle"))
    return Panel(f"{name}, {BLOCKS[block]}", 1 - network["accuracy"], tuple(lines))


def _point(row: Row, stage: str) -> tuple[float, float]:
    return row["macs"], 1 - row["stages"][stage]["accuracy"]
