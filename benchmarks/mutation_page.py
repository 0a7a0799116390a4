"""Records of `mutations.py` → tables on the screen, and in docs/verify.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from jobs import Line
from rich.console import Console
from rich.table import Table

FAULT_HEADS = ("fault", "put", "to be found", "found", "site named", "not shown", "missed")
FOLD_HEADS = ("right fold", "tried", "equivalent", "refused", "condemned", "not right", "not finite or not made")
Rows = Iterator[tuple[str, ...]]


def latest(lines: Sequence[Line]) -> list[Line]:
    """Keep the last line of each key, and only cases that could be put to a network."""
    return [line for line in {line["key"]: line for line in lines}.values() if not line.get("not_here")]


def show(lines: Sequence[Line]) -> None:
    console = Console(width=130)
    for heads, rows in ((FAULT_HEADS, fault_rows(lines)), (FOLD_HEADS, fold_rows(lines))):
        shown = Table(*heads)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for line in totals(lines):
        console.print(line, markup=False)


def table(lines: Sequence[Line]) -> str:
    """Write what stands in docs/verify.md."""
    parts = []
    for heads, rows in ((FAULT_HEADS, fault_rows(lines)), (FOLD_HEADS, fold_rows(lines))):
        parts += ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]
    return "\n".join([*totals(lines), *parts])


def totals(lines: Sequence[Line]) -> list[str]:
    found = latest(lines)
    faults = [line for line in found if line["key"].startswith("fault|") and "is_due" in line and not line["is_right"]]
    folds = [line for line in found if line.get("is_right")]
    due = [line for line in faults if line["is_due"]]
    sited = [line for line in due if line["is_named"] is not None and not line["is_missed"]]
    named = sum(bool(line["is_named"]) for line in sited)
    odd = Counter("died" if "died" in line else line["verdict"] for line in found)
    share = f" ({named / len(sited):.1%})" if sited else ""
    return [
        f"- {len(faults)} faults put into networks; {len(due)} move an output or a layer beyond rounding, of which "
        f"{sum(line['is_missed'] for line in due)} were missed.",
        f"- Of {len(sited)} of these that lie at one layer and were found, the report names it in {named}{share}.",
        f"- {len(folds)} right folds and equal networks; {sum(line['is_condemned'] for line in folds)} were condemned.",
        f"- Crashes: {odd['crash']}. Processes that died or hung: {odd['died']}.",
    ]


def _grouped(lines: Sequence[Line], of: Callable[[Line], bool]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in latest(lines):
        if "died" not in line and of(line):
            groups[line["key"].split("|")[-2]].append(line)
    return dict(sorted(groups.items()))


def fault_rows(lines: Sequence[Line]) -> Rows:
    for name, group in _grouped(lines, lambda line: "is_due" in line and not line["is_right"]).items():
        due = [line for line in group if line["is_due"]]
        sited = [line for line in due if line["is_named"] is not None and not line["is_missed"]]
        named = f"{sum(line['is_named'] for line in sited)} of {len(sited)}" if sited else "–"
        missed = sum(line["is_missed"] for line in due)
        yield (name, *map(str, (len(group), len(due), len(due) - missed, named, len(group) - len(due), missed)))


def fold_rows(lines: Sequence[Line]) -> Rows:
    for name, group in _grouped(
        lines, lambda line: line["key"].startswith("fold|") or line.get("is_right", False)
    ).items():
        verdicts = Counter(line["verdict"] for line in group)
        idle = verdicts["not finite"] + verdicts["not made"]
        condemned = sum(line.get("is_condemned", False) for line in group)
        wrong = sum(line["verdict"] == "different" and not line["is_condemned"] for line in group)  # the oracle agrees
        counts = (len(group), verdicts["equivalent"], verdicts["refused"], condemned, wrong, idle)
        yield (name, *map(str, counts))
