"""Every convolutional network of torchvision and timm through surgeon: does any crash, or come out wrong?

Each takes the whole path in a process of its own: survey, plan, convert (acnet), save and reload, fuse, verify, then
hetconv and octave, small ones first; `zoo_network.py` says how. Finished ones are appended to a file, one JSON object
a line; a sweep that is started again continues from there.

    python benchmarks/zoo.py --jobs 2                       # torchvision, and the smallest of every family of timm
    python benchmarks/zoo.py --only 'timm:*repvgg*' --again
    python benchmarks/zoo.py --write-docs                   # and docs/zoo.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torchvision
from jobs import Child, recorded
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from zoo_network import Case, Record, examine
from zoo_page import NOT_RUN, complaints, page, show

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
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "zoo.jsonl")
    parser.add_argument("--finished", action="store_true", help="examine nothing, only show what is finished")
    parser.add_argument("--write-docs", action="store_true", help="write docs/zoo.md from all that is finished")
    run(parser.parse_args())


def examine_here(case: Case, into: Path, memory: float) -> None:
    """Run as the process of one network, whose memory is limited."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with into.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        examine(case, str(into)).write()


def run(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = list(recorded(options.out))
    chosen = {line["chosen"]: (line["name"], line["parameters"]) for line in known if "chosen" in line}
    remembered = set(chosen)
    every = cases(every=options.all or bool(options.only), chosen=chosen)
    wanted = small_first(case for case in every if is_wanted(case, options))
    if options.list:
        print("\n".join(f"{case.name:50} {case.family}" for case in wanted))
        return
    with options.out.open("a", encoding="utf-8") as file:
        new = ((key, *found) for key, found in chosen.items() if key not in remembered)
        lines = ({"chosen": key, "name": name, "parameters": parameters} for key, name, parameters in new)
        file.writelines(json.dumps(line) + "\n" for line in lines)
    done = {line["name"] for line in known if "family" in line} if not options.again else set()
    sweep([case for case in wanted if case.name not in done] if not options.finished else [], options)
    found = {line.pop("name"): line for line in recorded(options.out) if "family" in line}
    latest = [Record(name, **{k: v for k, v in line.items() if k != "versions"}) for name, line in found.items()]
    rest = [Record(case.name, case.family, left_out=NOT_RUN) for case in wanted if case.name not in found]
    names = {case.name for case in wanted}
    records = [record for record in latest if record.name in names]
    show(records, Console(width=max(Console().width, 130)))
    if options.write_docs:
        (ROOT / "docs" / "zoo.md").write_text(
            page(sorted([*latest, *rest], key=lambda record: record.name), versions()), encoding="utf-8"
        )
    sys.exit(any(record.status in ("failed", "wrong") for record in records))


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
    found = []
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        parameters = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
        found.append(Case(f"torchvision:{name}", module.removeprefix("torchvision.models.").split(".")[-1], parameters))
    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if not every and names:
            key = f"{family} of timm {timm.__version__}"
            chosen[key] = chosen.get(key) or min(((name, size_of(name)) for name in names), key=lambda found: found[1])
            found.append(Case(f"timm:{chosen[key][0]}", family, chosen[key][1]))
        else:
            found += [Case(f"timm:{name}", family) for name in names]
    return found


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
    def begin(cls, case: Case, folder: Path, memory: float) -> Worker:
        into = folder / f"{re.sub(r'[^a-z0-9]+', '-', case.name)}.json"
        return cls(case, Child.begin(lambda: examine_here(case, into, memory)), into, time.monotonic())

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
    examine(Case("timm:test_efficientnet", ""))  # what is imported by that is there in every copy of this process
    waiting, running, failures = list(reversed(todo)), [], 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = Progress(*columns, console=Console(stderr=True), auto_refresh=False)  # no thread, for copies are made
    with screen as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(todo))
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    running.append(Worker.begin(waiting.pop(), Path(folder), options.memory))
                progress.update(task, description=f"{failures} failed   {', '.join(one.case.name for one in running)}")
                progress.refresh()
                time.sleep(0.2)
                ended = [(one, record) for one in running if (record := one.finished(options.timeout)) is not None]
                for worker, record in ended:
                    running.remove(worker)
                    append(record, options.out)
                    progress.advance(task)
                    if faults := complaints(record):
                        failures += 1
                        progress.print(f"{record.name}: {'; '.join(faults)}", markup=False)
        finally:
            for worker in running:
                worker.process.kill()


def append(record: Record, out: Path) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(record), "versions": versions()}) + "\n")


def versions() -> dict[str, str]:
    named = {"surgeon": surgeon, "torch": torch, "torchvision": torchvision, "timm": timm}
    return {name: str(one.__version__) for name, one in named.items()} | {"python": platform.python_version()}


if __name__ == "__main__":
    main()
