"""Records of `hostile.py` → tables on the screen, and in docs/security.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from jobs import Line
from rich.console import Console
from rich.table import Table

HEADS = (
    "what",
    "tried",
    "refused",
    "opened",
    "code run or file touched",
    "traceback or crash",
    "hang",
    "damage not said",
    "other",
)
KINDS = {
    "damage": "damaged",
    "pickle": "pickles that call something",
    "drawn": "drawn at random",
    "special": "no ordinary file",
    "tag": "tags in a recipe",
    "kill": "ended while writing",
}
SORTS = {
    "code run or file touched": re.compile(
        r"marker|another file|outside|imported|compiled|os\.|subprocess|socket|shutil|urllib"
    ),
    "traceback or crash": re.compile(r"traceback|the process ended|exit \d|not caught"),
    "hang": re.compile(r"not done after"),
    "damage not said": re.compile(r"without a word, with other|neither whole"),
}


def latest(lines: Sequence[Line]) -> list[Line]:
    """Keep the last line of each key, and only files that could be made."""
    return [line for line in {line["key"]: line for line in lines}.values() if "not_made" not in line]


def faults_of(line: Line) -> list[str]:
    return [line["died"]] if "died" in line else line["faults"]


def rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in latest(lines):
        groups[group_of(line["key"])].append(line)
    for name, group in sorted(groups.items()):
        sorts = Counter(sort for line in group for sort in {sort_of(fault) for fault in faults_of(line)})
        codes = Counter(line.get("code") for line in group)
        opened = codes[0] + codes[1] + codes[3] if not name.startswith(KINDS["kill"]) else 0
        counts = (len(group), codes[2], opened, *(sorts[sort] for sort in SORTS), sorts["other"])
        yield (name, *map(str, counts))


def group_of(key: str) -> str:
    kind, what, how, *_ = key.split("|")
    if kind == "damage":
        form = "legacy .pt" if "legacy" in what else f".{what.rpartition('.')[2]}"
        return f"{form}, damaged"
    if kind == "kill":
        return f"{KINDS[kind]}: {what}, {how}"
    return f"{KINDS[kind]}: {what}" if kind == "drawn" else KINDS[kind]


def sort_of(fault: str) -> str:
    return next((sort for sort, pattern in SORTS.items() if pattern.search(fault)), "other")


def totals(lines: Sequence[Line]) -> list[str]:
    found = latest(lines)
    killed = [line for line in found if line["key"].startswith("kill|")]
    files = len(found) - len(killed)
    bad = [line for line in found if faults_of(line)]
    return [
        f"- {files} damaged or hostile files, and {len(killed)} commands ended while they worked, "
        f"{sum(line.get('was_running', False) for line in killed)} of them before they were done.",
        f"- With a fault: {len(bad)}.",
    ]


def show(lines: Sequence[Line]) -> None:
    console = Console(width=150)
    shown = Table(*HEADS)
    for row in rows(lines):
        shown.add_row(*row)
    console.print(shown)
    for line in totals(lines):
        console.print(line, markup=False)
    faults: dict[str, list[str]] = defaultdict(list)
    for line in latest(lines):
        for fault in faults_of(line):
            faults[re.sub(r"0x[0-9a-f]+|/tmp/\S+|\d{3,}", "…", fault)].append(line["key"])
    for fault, keys in sorted(faults.items(), key=lambda one: -len(one[1]))[:40]:
        console.print(f"{len(keys):5}  {fault}\n       for example {keys[0]}", markup=False, highlight=False)


def table(lines: Sequence[Line]) -> str:
    """Write what stands in docs/security.md."""
    body = [f"| {' | '.join(row)} |" for row in (HEADS, ["---"] * len(HEADS), *rows(lines))]
    return "\n".join([*totals(lines), "", *body])
