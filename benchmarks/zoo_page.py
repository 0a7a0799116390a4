"""Records of the zoo → the table on the screen, and docs/zoo.md."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from zoo_network import LIMIT, USUAL
from zoo_record import Brings, Record

SAVES_LITTLE = ("network", "MACs", "swapped", "convs that stay, and why most do")
ENOUGH = 0.65  # the share of the multiply-adds that octave should leave at most
NOT_RUN = "not run here, for time"
HEADS = (
    *("network", "convs", "swapped", "dense 3×3", "norms", "convert", "fuse", "octave", "MACs", "seams", "islands"),
    *("s", "result"),
)


def show(records: Sequence[Record], console: Console) -> None:
    table = Table(*HEADS)
    table.columns[0].no_wrap = True
    for row in rows(records):
        table.add_row(*row)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in Counter(r.status for r in records).items()))


def show_gains(records: Sequence[Record], console: Console) -> None:
    """Show what the recipes bring, of networks that were only planned."""
    table = Table("network", "norms", "hetconv", "octave", "swapped", "idle", "convs that stay, and why most do")
    for record in records:
        if (one := record.brings) is not None:
            norms, octave = brought(one)
            hetconv = "" if one.hetconv is None else f"×{one.hetconv:.2f}"
            why = f"{one.stays.get(one.why, 0)}: {one.why}" if one.why else ""
            table.add_row(record.name, norms, hetconv, octave, str(one.octaves), str(len(one.idle)), why)
        elif record.errors:
            table.add_row(record.name, *[""] * 5, "; ".join(complaints(record)))
    console.print(table)
    console.print("\n".join(gains(records)), markup=False)


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
        norms, macs = brought(record.brings)
        octave = (str(record.octaves or ""), macs, seams)
        yield (record.name, *count, dense, norms, *apart, *octave, islands, seconds, record.status)


def brought(found: Brings | None) -> tuple[str, str]:
    """Write how many norms are taken over, and what share of the multiply-adds octave leaves."""
    norms = f"{found.taken} of {found.fronts}" if found and found.fronts else ""
    if found is None or found.octave is None:
        return norms, ""
    return norms, f"×{found.octave:.2f}{', folded first' if found.folded_first else ''}"


def page(records: Sequence[Record], versions: Counter[str]) -> str:
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
        "- `norms`: of the ACBlocks in front of a batch norm of any class, those that take it over, and so are exact",
        "  in train mode, too.",
        "- `convert`, `fuse`: relative L2 of the output that is furthest apart. Before fusing, the strips of the",
        "  ACBlocks are given numbers, as training would.",
        "- `octave`, `seams`: convs that `octave` swaps, and kinds of places where its two streams are still joined or",
        "  split. The inputs are small here, and it swaps what has a map of two pixels.",
        "- `MACs`: the share of the multiply-adds that `octave` leaves at the size that the network is made for",
        "  (planned only; a detector sees 320 pixels).",
        "- `islands`: `whole` where the network can be traced, else into how many parts it falls.",
        "",
        *(f"- {count} architectures with {named}." for named, count in versions.most_common()),
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
        *gains(records),
        f"- Traced as a whole: {sum(is_whole(record) for record in done)} of {len(done)} networks.",
    ]


def gains(records: Sequence[Record]) -> list[str]:
    """Sum up what conversions bring, over all networks that were planned."""
    planned = [record.brings for record in records if record.brings]
    if not planned:
        return []
    taken, fronts = sum(one.taken for one in planned), sum(one.fronts for one in planned)
    suited = [1.0 if one.octave is None else one.octave for one in planned if is_suited(one)]
    idle = sum(len(one.idle) for one in planned)
    share = f"{taken / fronts:.1%}" if fronts else "none"
    return [
        "- ACBlocks in front of a batch norm that take it over, and are exact in train mode: "
        f"{taken} of {fronts}, {share}.",
        *median_of(suited),
        f"- Swaps of `octave` that save nothing: {idle}.",
    ]


def median_of(suited: Sequence[float]) -> Iterator[str]:
    if suited:
        little = sum(one <= ENOUGH for one in suited)
        yield (
            f"- `octave` leaves ×{statistics.median(suited):.2f} of the multiply-adds in the median of {len(suited)} "
            f"networks that have dense 3×3 convs and batch norms; in {little} of them ×{ENOUGH} or less."
        )


def is_suited(found: Brings) -> bool:
    """Whether a network has what octave saves at."""
    return bool(found.dense) and found.has_batch_norms


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
        ("Why ACBlocks do not take over the batch norm behind them", counted, untaken(records)),
        (f"More than ×{ENOUGH} of the multiply-adds left by `octave`", SAVES_LITTLE, costly(records)),
        ("Swaps of `octave` that save nothing", ("network", "convs"), idles(records)),
        ("Why convs stay under `acnet`", counted, reasons(done, "skipped")),
        ("Why dense 3×3 convs stay under `acnet`", counted, reasons(done, "dense_skipped")),
        ("Why networks are not one island", ("networks", "reason"), untraced(done)),
        ("Why the two streams of `octave` are joined or split", ("networks", "reason"), seams(done)),
        ("Left out", ("networks", "reason"), [(", ".join(names), reason) for reason, names in left.items()]),
    ]


def untaken(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Count the reasons why a norm is not taken over."""
    convs: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for record in records:
        found: Counter[str] = Counter()
        for reason, count in (record.brings.left if record.brings else {}).items():
            found[without_names(reason)] += count
        convs.update(found)
        networks.update(found.keys())
    return [(str(count), str(networks[reason]), reason) for reason, count in convs.most_common()]


def costly(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """List the networks with dense convs and norms where octave saves too little, and why most of their convs stay."""
    found = [(record.name, one) for record in records if (one := record.brings) and is_suited(one)]
    found = [(name, one) for name, one in found if one.octave is None or one.octave > ENOUGH]
    found.sort(key=lambda pair: -(pair[1].octave or 1.0))
    return [
        (name, f"×{one.octave or 1.0:.2f}", str(one.octaves), f"{one.stays.get(one.why, 0)}: {one.why}")
        for name, one in found
    ]


def idles(records: Sequence[Record]) -> list[tuple[str, ...]]:
    found = [(record.name, record.brings.idle) for record in records if record.brings and record.brings.idle]
    return [(name, ", ".join([*idle[:5], *["…"] * (len(idle) > 5)])) for name, idle in found]


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
