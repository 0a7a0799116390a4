"""Every convolutional network of torchvision and timm through surgeon: does any crash, or come out wrong?

Each takes the whole path in a process of its own: survey, plan, convert (acnet), save and reload, fuse, verify, then
hetconv and octave, small ones first; `zoo_network.py` says how. Finished ones are appended to a file, one JSON object
a line; a sweep that is started again continues from there.

    python benchmarks/zoo.py --jobs 2                       # torchvision, and the smallest of every family of timm
    python benchmarks/zoo.py --only 'timm:*repvgg*' --again
    python benchmarks/zoo.py --plans-only --jobs 16 --budget 480 --timeout 90    # what the recipes bring, in minutes
    python benchmarks/zoo.py --write-docs                   # and docs/zoo.md
    python benchmarks/zoo.py --finished --write-docs --also other.jsonl          # with what another machine has found
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from jobs import Child, recorded
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from zoo_brings import plan_only
from zoo_network import examine
from zoo_page import NOT_RUN, complaints, page, show, show_gains
from zoo_record import Case, Record

import surgeon

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of any architectures: 'timm:repvgg*'")
    parser.add_argument("--library", choices=("torchvision", "timm"))
    parser.add_argument("--all", action="store_true", help="all of timm, not the smallest of each family")
    parser.add_argument("--list", action="store_true", help="only list the networks that would be examined")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one network may take")
    parser.add_argument("--memory", type=float, default=8, help="GiB that one network may take")
    parser.add_argument("--again", action="store_true", help="examine finished networks again")
    parser.add_argument("--plans-only", action="store_true", help="only plan, to see what the recipes bring")
    parser.add_argument("--budget", type=float, help="start nothing after so many seconds; large networks come first")
    parser.add_argument("--out", type=Path, help="what is finished  [default: out/zoo.jsonl, or out/zoo-plans.jsonl]")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="FILE", help="more files of finished ones")
    parser.add_argument("--finished", action="store_true", help="examine nothing, only show what is finished")
    parser.add_argument("--write-docs", action="store_true", help="write docs/zoo.md from all that is finished")
    run(parser.parse_args())


def examine_here(case: Case, into: Path, memory: float, plans_only: bool) -> None:
    """Run as the process of one network, whose memory is limited."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with into.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        (plan_only if plans_only else examine)(case, str(into)).write()


def run(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    full, plans = ROOT / "out" / "zoo.jsonl", ROOT / "out" / "zoo-plans.jsonl"
    options.out = options.out or (plans if options.plans_only else full)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files = dict.fromkeys((full, plans, *options.also, options.out))
    known = [line for file in files for line in recorded(file)]
    chosen = {line["chosen"]: (line["name"], line["parameters"]) for line in known if "chosen" in line}
    remembered = set(chosen)
    every = cases(every=options.all or bool(options.only), chosen=chosen)
    wanted = small_first(case for case in every if is_wanted(case, options))
    if options.budget:
        wanted.sort(key=lambda case: -case.parameters)
    if options.list:
        print("\n".join(f"{case.name:50} {case.family}" for case in wanted))
        return
    with options.out.open("a", encoding="utf-8") as file:
        new = ((key, *found) for key, found in chosen.items() if key not in remembered)
        lines = ({"chosen": key, "name": name, "parameters": parameters} for key, name, parameters in new)
        file.writelines(json.dumps(line) + "\n" for line in lines)
    latest = merged(line for file in files for line in recorded(file))
    done = {name for name, one in latest.items() if is_finished(one, plans_only=options.plans_only)}
    done = set() if options.again else done
    sweep([case for case in wanted if case.name not in done] if not options.finished else [], options)
    latest = merged(line for file in files for line in recorded(file))
    rest = [Record(case.name, case.family, left_out=NOT_RUN) for case in wanted if case.name not in latest]
    names = {case.name for case in wanted}
    records = [record for name, record in latest.items() if name in names]
    console = Console(width=max(Console().width, 130))
    show_gains(records, console) if options.plans_only else show(records, console)
    if options.write_docs:
        (ROOT / "docs" / "zoo.md").write_text(
            page(sorted([*latest.values(), *rest], key=lambda record: record.name), used([*map(recorded, files)])),
            encoding="utf-8",
        )
    sys.exit(any(record.status in ("failed", "wrong") for record in records))


def is_finished(record: Record, *, plans_only: bool) -> bool:
    """Whether a network need not be looked at again."""
    was_run = record.left_out != NOT_RUN
    return (record.brings is not None or bool(record.left_out and was_run)) if plans_only else was_run


def merged(lines: Iterable[dict[str, Any]]) -> dict[str, Record]:
    """Give the latest record of every network; one that was only planned adds what conversions bring to it.

    A network that was only planned counts as not run.
    """
    found: dict[str, Record] = {}
    for line in lines:
        if "family" not in line:
            continue
        record = Record(**{key: value for key, value in line.items() if key not in ("versions", "plans_only")})
        before = found.get(record.name)
        if line.get("plans_only") and before is not None:
            before.brings = record.brings or before.brings
            before.errors = [*before.errors, *record.errors]
        elif line.get("plans_only"):
            found[record.name] = replace(record, left_out=record.left_out or (None if record.errors else NOT_RUN))
        else:
            found[record.name] = replace(record, brings=record.brings or (before.brings if before else None))
    return found


def is_wanted(case: Case, options: argparse.Namespace) -> bool:
    library, _, name = case.name.partition(":")
    if options.library not in (None, library):
        return False
    patterns = options.only or ["*"]
    return any(fnmatch.fnmatch(one, pattern) for one in (case.name, name) for pattern in patterns)


def small_first(found: Iterable[Case]) -> list[Case]:
    """Put the smallest one of every family first, and then the others, which go a shorter way; each by size."""
    seen: set[tuple[str, str]] = set()
    ordered = []
    for case in sorted(found, key=lambda case: case.parameters):
        family = (case.name.partition(":")[0], case.family)
        ordered.append(case._replace(is_brief=family in seen))
        seen |= {family} if ":quantized_" not in case.name else set()
    return sorted(ordered, key=lambda case: case.is_brief)


def cases(*, every: bool, chosen: dict[str, tuple[str, int]]) -> list[Case]:
    """List the architectures; of timm the smallest one of each family unless `every` is asked for.

    `chosen` remembers the smallest ones, and how many parameters they have.
    """
    found, listed = [], on_the_page()
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        parameters = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
        found.append(Case(f"torchvision:{name}", module.removeprefix("torchvision.models.").split(".")[-1], parameters))
    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if not every and names:
            key = f"{family} of timm {timm.__version__}"
            among = [name for name in names if name in listed] or names  # counting all of them takes minutes
            chosen[key] = chosen.get(key) or min(((name, size_of(name)) for name in among), key=lambda found: found[1])
            found.append(Case(f"timm:{chosen[key][0]}", family, chosen[key][1]))
        else:
            found += [Case(f"timm:{name}", family) for name in names]
    return found


def on_the_page() -> set[str]:
    """List the networks of timm in docs/zoo.md, if the page is of the version that is here."""
    path = ROOT / "docs" / "zoo.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return {*re.findall(r"timm:(\w+)", text)} if f"timm {timm.__version__}," in text else set()


def size_of(name: str) -> int:
    """Count the parameters of a network of timm, without making any numbers if that is possible."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class Worker:
    """A process that examines one network, and what it has written so far."""

    case: Case
    process: Child
    into: Path
    start: float

    @classmethod
    def begin(cls, case: Case, folder: Path, memory: float, plans_only: bool) -> Worker:
        into = folder / f"{re.sub(r'[^a-z0-9]+', '-', case.name)}.json"
        return cls(case, Child.begin(lambda: examine_here(case, into, memory, plans_only)), into, time.monotonic())

    def finished(self, timeout: float) -> Record | None:
        """Give the record once the process has ended, however it did, or has taken too long."""
        code = self.process.poll()
        is_late = code is None and time.monotonic() - self.start > timeout
        if code is None and not is_late:
            return None
        if is_late:
            self.process.kill()
            self.process.wait()
        record = Record(**json.loads(self.into.read_text())) if self.into.exists() else Record(*self.case[:2])
        if is_late or code:
            how = f"not done after {timeout:.0f} s" if is_late else f"the process ended with {code}"
            last = self.into.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
            record.note(how, "".join(last)[:200])
        record.into = None
        return record


def sweep(todo: Sequence[Case], options: argparse.Namespace) -> None:
    """Examine the networks, `--jobs` at a time, and append what was found about each to the file."""
    if not todo:
        return
    torch.set_num_threads(1)
    end = time.monotonic() + options.budget if options.budget else math.inf
    first = plan_only if options.plans_only else examine
    first(Case("timm:test_efficientnet", ""))  # what is imported by that is there in every copy of this process
    waiting, running, failures = list(reversed(todo)), [], 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = Progress(*columns, console=Console(stderr=True), auto_refresh=False)  # no thread, for copies are made
    with screen as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(todo))
        try:
            while waiting or running:
                if time.monotonic() > end:
                    waiting.clear()
                while waiting and len(running) < options.jobs:
                    running.append(Worker.begin(waiting.pop(), Path(folder), options.memory, options.plans_only))
                progress.update(task, description=f"{failures} failed   {', '.join(one.case.name for one in running)}")
                progress.refresh()
                time.sleep(0.2)
                ended = [(one, record) for one in running if (record := one.finished(options.timeout)) is not None]
                for worker, record in ended:
                    running.remove(worker)
                    append(record, options.out, plans_only=options.plans_only)
                    progress.advance(task)
                    if faults := complaints(record):
                        failures += 1
                        progress.print(f"{record.name}: {'; '.join(faults)}", markup=False)
        finally:
            for worker in running:
                worker.process.kill()


def append(record: Record, out: Path, *, plans_only: bool) -> None:
    mark = {"plans_only": True} if plans_only else {}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(record), **mark, "versions": versions()}) + "\n")


def used(files: Iterable[Iterable[dict[str, Any]]]) -> Counter[str]:
    """Count the networks that were examined with the same versions, in words."""
    latest = {line["name"]: line["versions"] for lines in files for line in lines if line.get("versions")}
    return Counter(", ".join(f"{name} {version}" for name, version in one.items()) for one in latest.values())


def versions() -> dict[str, str]:
    named = {"surgeon": surgeon, "torch": torch, "torchvision": torchvision, "timm": timm}
    return {name: str(one.__version__) for name, one in named.items()} | {"python": platform.python_version()}


if __name__ == "__main__":
    main()
