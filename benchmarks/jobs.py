"""Work in many processes, of which any may crash or hang. What is done is in a file, and is not done again.

Work comes in batches; each is done by a copy of this process, so that nothing has to be imported again. A copy writes
one line for each of its keys. Where it dies or takes too long, the key it was at is recorded with that, and the rest of
the batch is given to another copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Line = dict[str, Any]


@dataclass
class Child:
    """A copy of this process, which need not import everything again; the part of Popen that is needed here."""

    pid: int
    returncode: int | None = None

    @classmethod
    def begin(cls, work: Callable[[], None]) -> Child:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of torch's threads, which are idle
            pid = os.fork()
        if pid:
            return cls(pid)
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@dataclass(frozen=True)
class Batch:
    """Keys that are done one after another in one process; `work` gives a line for each, in order."""

    keys: tuple[str, ...]
    work: Callable[[Sequence[str]], Iterator[Line]]


@dataclass
class _Running:
    batch: Batch
    child: Child
    into: Path
    seen: int = 0
    since: float = 0.0

    @classmethod
    def begin(cls, batch: Batch, into: Path) -> _Running:
        def work() -> None:
            with into.open("w", encoding="utf-8") as file:
                for line in batch.work(batch.keys):
                    file.write(json.dumps(line) + "\n")
                    file.flush()

        into.unlink(missing_ok=True)
        return cls(batch, Child.begin(work), into, since=time.monotonic())

    def lines(self) -> list[Line]:
        """Give the lines that are whole."""
        text = self.into.read_text(encoding="utf-8") if self.into.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if len(found) > self.seen:
            self.seen, self.since = len(found), time.monotonic()
        return found


def seed_of(key: str) -> int:
    """Give the seed of a key: the same one on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


def recorded(out: Path) -> Iterator[Line]:
    """Read the lines of the file; the last one may have been cut short when a run was stopped."""
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def carry_out(batches: Iterable[Batch], out: Path, *, jobs: int, timeout: float, show: bool = True) -> float:
    """Do what is not recorded yet, and append it; give the seconds of one process that this took.

    `timeout` is how many seconds one key may take.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {line["key"] for line in recorded(out)}
    waiting = [Batch(rest, batch.work) for batch in batches if (rest := tuple(k for k in batch.keys if k not in done))]
    waiting.reverse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    screen = Progress(*columns, console=Console(stderr=True), auto_refresh=False, disable=not show)
    running: list[_Running] = []
    seconds, number = 0.0, 0
    with screen as progress, tempfile.TemporaryDirectory() as folder, out.open("a", encoding="utf-8") as file:
        task = progress.add_task("", total=sum(len(batch.keys) for batch in waiting))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number += 1
                    running.append(_Running.begin(waiting.pop(), Path(folder) / str(number)))
                time.sleep(0.02)
                seconds += 0.02 * len(running)
                for one in list(running):
                    if (ended := _ended(one, timeout)) is None:
                        continue
                    lines, rest = ended
                    running.remove(one)
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                    file.flush()
                    progress.advance(task, len(lines))
                    if rest:
                        waiting.append(Batch(rest, one.batch.work))
                progress.refresh()
        finally:
            for one in running:
                one.child.kill()
                one.child.wait()
    return seconds


def _ended(one: _Running, timeout: float) -> tuple[list[Line], tuple[str, ...]] | None:
    """Give the lines of a process that has ended, or has to be, and the keys that are left; None if it goes on."""
    code = one.child.poll()
    lines = one.lines()
    is_late = code is None and time.monotonic() - one.since > timeout
    if code is None and not is_late:
        return None
    if is_late:
        one.child.kill()
        one.child.wait()
    rest = one.batch.keys[len(lines) :]
    if rest:
        how = f"not done after {timeout:.0f} s" if is_late else f"the process ended with {code}"
        lines.append({"key": rest[0], "died": how})
    return lines, rest[1:]


def write_between(page: Path, name: str, text: str) -> None:
    """Put a text between the marks `<!-- name -->` and `<!-- /name -->` of a page.

    Raises:
        SystemExit: the page or its marks are missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in old or end not in old.split(begin, 1)[1]:
        raise SystemExit(f"{page} is missing, or has no lines {begin} and {end} to write between. Add them.")
    before, rest = old.split(begin, 1)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
