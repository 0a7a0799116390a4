"""Records of the zoo → the table on the screen, and docs/zoo.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from zoo_network import LIMIT, USUAL, Record

NOT_RUN = "not run here, for time"
HEADS = ("network", "convs", "swapped", "dense 3×3", "convert", "fuse", "octave", "seams", "islands", "s", "result")


def show(records: Sequence[Record], console: Console) -> None:
    table = Table(*HEADS)
    table.columns[0].no_wrap = True
    for row in rows(records):
        table.add_row(*row)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in Counter(r.status for r in records).items()))


def rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Give a line for each network that was examined."""
    for record in records:
        if record.left_out:
            continue
        dense = f"{record.dense_swapped} of {record.dense}" if record.dense and record.swapped is not None else ""
        apart = [f"{record.apart[step]:.0e}" if step in record.apart else "" for step in ("convert", "fuse")]
        islands = "whole" if is_whole(record) else str(record.islands or "")
        count = ("" if one is None else str(one) for one in (record.sites, record.swapped))
        seams = str(len(record.seams)) if record.octaves else ""
        seconds = f"{sum(record.seconds.values()):.0f}"
        yield (record.name, *count, dense, *apart, str(record.octaves or ""), seams, islands, seconds, record.status)


def page(records: Sequence[Record], versions: dict[str, str]) -> str:
    """Write docs/zoo.md."""
    done = [record for record in records if not record.left_out]
    lines = [
        "# The zoo",
        "",
        "Every architecture of torchvision, and the smallest of each family of timm, with random weights, in float64",
        "and eval mode: converted with `acnet`, saved, reloaded, fused and verified; converted with `hetconv-p4`;",
        "converted with `octave` and deployed. Of a family of torchvision the smallest one goes all that way; larger",
        "ones need not be reloaded, verified, or converted with `hetconv-p4`.",
        "Written by `python benchmarks/zoo.py --write-docs`.",
        "",
        "- `swapped`, `dense 3×3`: convs that `acnet` swaps, and how many of those that are 3×3 without groups.",
        "- `convert`, `fuse`: relative L2 of the output that is furthest apart. Before fusing, the strips of the",
        "  ACBlocks are given numbers, as training would.",
        "- `octave`, `seams`: convs that `octave` swaps, and kinds of places where its two streams are still joined or",
        "  split.",
        "- `islands`: `whole` where the network can be traced, else into how many parts it falls.",
        "",
        f"With {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        *totals(records, done),
        "",
        *markdown(HEADS, rows(records)),
    ]
    for title, heads, body in sections(records, done):
        lines += ["", f"## {title}", "", *(markdown(heads, body) if body else ["None."])]
    return "\n".join(lines) + "\n"


def totals(records: Sequence[Record], done: Sequence[Record]) -> list[str]:
    dense = [record for record in done if record.dense]
    swapped, total = (sum(getattr(record, key) or 0 for record in dense) for key in ("dense_swapped", "dense"))
    numbers = [number for record in done if record.dtype == "float64" for number in taken(record)]
    usual = [number for number in numbers if number <= LIMIT["float64"]]
    swaps = len(numbers) - len(usual)
    statuses = Counter("not run" if r.left_out == NOT_RUN else r.status for r in records)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    return [
        f"- {len(records)} architectures: {counts}.",
        f"- `acnet` swaps {swapped} of {total} dense 3×3 convs of {len(dense)} networks, {swapped / (total or 1):.1%}.",
        f"- Relative L2 after converting or fusing: at most {max(usual, default=0.0):.1e}"
        + (f"; {swaps} more, where rounding decides the order of the outputs (below)." if swaps else "."),
        f"- Traced as a whole: {sum(is_whole(record) for record in done)} of {len(done)} networks.",
    ]


def sections(records: Sequence[Record], done: Sequence[Record]) -> list[tuple[str, tuple[str, ...], list[Any]]]:
    """Give what the page lists below its table: title, heads of columns, rows."""
    counted = ("convs", "networks", "reason")
    failed = [(record.name, "; ".join(complaints(record))) for record in done if complaints(record)]
    unusual = [record for record in done if taken(record) and max(taken(record)) > USUAL[record.dtype]]
    far = [(record.name, f"{max(taken(record)):.0e}", f"{record.moved_by_rounding or 0:.0e}") for record in unusual]
    single = [(record.name,) for record in done if record.dtype == "float32"]
    left: dict[str, list[str]] = {}
    for record in records:
        if record.left_out:
            left.setdefault(record.left_out, []).append(record.name)
    low = [record for record in done if record.dense and (record.dense_swapped or 0) < 0.95 * record.dense]
    few = [(r.name, f"{r.dense_swapped or 0} of {r.dense}", "; ".join(r.dense_skipped)) for r in low]
    return [
        ("In float32, because they do not run in float64", ("network",), single),
        ("Failed or wrong", ("network", "what"), failed),
        (
            f"Further than {USUAL['float64']:.0e}",
            ("network", "relative L2", "one unit in the last place of every weight"),
            far,
        ),
        ("Fewer than 95 % of the dense 3×3 convs swapped", ("network", "swapped", "reasons"), few),
        ("Why convs stay under `acnet`", counted, reasons(done, "skipped")),
        ("Why dense 3×3 convs stay under `acnet`", counted, reasons(done, "dense_skipped")),
        ("Why networks are not one island", ("networks", "reason"), untraced(done)),
        ("Why the two streams of `octave` are joined or split", ("networks", "reason"), seams(done)),
        ("Left out", ("networks", "reason"), [(", ".join(names), reason) for reason, names in left.items()]),
    ]


def is_whole(record: Record) -> bool:
    return bool(record.islands) and not record.opaque


def taken(record: Record) -> list[float]:
    return [record.apart[step] for step in ("convert", "fuse") if step in record.apart]


def reasons(records: Sequence[Record], kind: str) -> list[tuple[str, ...]]:
    """Count the reasons over all networks, without the names of modules in them."""
    convs: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for record in records:
        found: Counter[str] = Counter()
        for reason, count in getattr(record, kind).items():
            found[without_names(reason)] += count
        convs.update(found)
        networks.update(found.keys())
    return [(str(count), str(networks[reason]), reason) for reason, count in convs.most_common()]


def untraced(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Count the reasons why the outermost opaque part of a network could not be traced."""
    firsts = Counter(without_names(next(iter(record.opaque.values()))) for record in records if record.opaque)
    return [(str(count), reason) for reason, count in firsts.most_common()]


def seams(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Count networks by the reason of a seam, most frequent first; reasons of only one network are left out."""
    found = Counter(reason for record in records for reason in {_numberless(one) for one in record.seams})
    return [(str(count), reason) for reason, count in found.most_common() if count > 1]


def _numberless(reason: str) -> str:
    """Leave out the number that tells one step of a graph from another: 'add_3' is an add."""
    return re.sub(r"'(\w+?)_\d+'", r"'\1'", without_names(reason))


def without_names(reason: str) -> str:
    """Leave out paths of modules, and places in files.

    >>> without_names("it shares its weights with head.0.conv1")
    'it shares its weights with …'
    >>> without_names("`x.mean(1)` in Gate.forward (gate.py:12, layer1.0) needs the whole map")
    '`x.mean(1)` in Gate.forward needs the whole map'
    """
    reason = re.sub(r" \(\w+\.py:\d+(, [\w.]+)?\)", "", reason)
    parts = re.split(r"(`.*?` in \S+)", reason)  # names in the user's code stay
    return "".join(one if one.startswith("`") else re.sub(r"\b\w+(\.\w+)+\b", "…", one) for one in parts)


def markdown(heads: Sequence[str], body: Any) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *body)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(heads), *cells[1:])]


def complaints(record: Record) -> list[str]:
    """Say what went wrong; an error that stops several steps is listed once."""
    steps: dict[str, list[str]] = {}
    for one in record.errors:
        steps.setdefault(f"{one['error']} ({one['place']})", []).append(one["step"])
    return [*(f"{', '.join(where)}: {what}" for what, where in steps.items()), *record.wrong]
