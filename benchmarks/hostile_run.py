"""One command of surgeon in a copy of this process, watched: what it opens, starts and connects to, and how it ends."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_pickles import MARK, Places, places
from jobs import Child

SECONDS = 30
MEMORY = 4 << 30
PAYLOAD = """\
import os
open({marker!r}, "w").write("ran")
class Evil: pass
def main(*a): return Evil()
"""
STARTS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "os.startfile",
    "webbrowser.open",
    "code.__new__",
)
TOUCHES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.utime",
    "os.mkdir",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)


@dataclass
class Outcome:
    """How a command ended; `faults` says what it must not have done."""

    code: int | None
    said: str
    faults: list[str]
    digest: str | None = None
    seconds: float = 0.0


def run(
    arguments: Sequence[str], folder: Path, good: Path, check: Callable[[], str] | None = None, seconds: float = SECONDS
) -> Outcome:
    """Run `surgeon …` in `folder/in`; after exit 0 also run `check`, whose answer is the digest."""
    inside = folder / "in"
    at = places(folder)
    (inside / "hostile_payload.py").write_text(PAYLOAD.format(marker=at.marker))
    Path(at.canary).write_text("untouched")
    Path(at.secret).write_text(f"{MARK}-secret")
    before = {file.name for file in inside.iterdir()}
    start = time.monotonic()
    child = Child.begin(lambda: _inside(arguments, folder, good, check))
    while child.poll() is None and time.monotonic() - start < seconds:
        time.sleep(0.002)
    faults = []
    if child.returncode is None:
        child.kill()
        child.wait()
        faults.append(f"not done after {seconds:.0f} s")
    report = json.loads(_text(folder / "report.json") or "{}")  # one that was killed has left it empty
    code = report.get("code")
    if not report and not faults:
        faults.append(f"the process ended with {child.returncode}")
    said = _text(folder / "stderr")
    faults += report.get("faults", [])
    faults += _traces(at, said + _text(folder / "stdout"))
    if code not in (0, 1, 2, 3, None):
        faults.append(f"exit {code}")
    if code == 2:
        faults += [
            f"{name} was left"
            for name in sorted({f.name for f in inside.iterdir()} - before)
            if "__pycache__" not in name
        ]
        if len(said.strip()) < 10:
            faults.append("exit 2 without a word")
    return Outcome(code, said, faults, report.get("digest"), time.monotonic() - start)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _traces(at: Places, said: str) -> list[str]:
    faults = []
    if Path(at.marker).exists():
        faults.append("it wrote the marker")
    if not Path(at.canary).exists() or Path(at.canary).read_text(errors="replace") != "untouched":
        faults.append("it changed another file")
    if f"{MARK}-secret" in said:
        faults.append("it showed another file")
    if "Traceback (most recent call last)" in said:
        faults.append(f"traceback: {said.strip().splitlines()[-1][:150]}")
    if any(
        ord(letter) < 32 and letter not in "\n\t\r" for letter in said.replace("\x1b[?25h", "").replace("\x1b[?25l", "")
    ):
        faults.append("control characters on the terminal")
    return faults


def _inside(arguments: Sequence[str], folder: Path, good: Path, check: Callable[[], str] | None) -> None:
    """Run in the copy of the process; what was seen goes to report.json."""
    os.setsid()
    os.chdir(folder / "in")
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    report_file = os.open(folder / "report.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ |= {"TMPDIR": str(folder / "in"), "HOME": str(folder / "in"), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder / "in"))  # as a user's own folder may be on it
    seen: list[str] = []
    watch(seen, folder / "in", places(folder))
    from surgeon.app import cli

    report: dict[str, Any] = {"code": None}
    try:
        cli.main(list(arguments))
        report["code"] = 0
    except SystemExit as error:
        report["code"] = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
        seen.append(f"not caught: {type(error).__name__}: {str(error)[:100]}")
    sys.stdout.flush()
    sys.stderr.flush()
    if report["code"] == 0 and check is not None:
        try:
            report["digest"] = check()
        except Exception as error:
            report["digest"] = f"{type(error).__name__}: {str(error)[:200]}"
    os.write(report_file, json.dumps(report | {"faults": sorted(set(seen))}).encode())
    os._exit(0)


def watch(seen: list[str], inside: Path, at: Places) -> None:
    """Note every event of Python that no command of surgeon has a reason for. A hook can never be taken off again."""
    allowed = (str(inside), "/dev/", "/proc/")

    def is_outside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        name = os.path.abspath(os.fsdecode(path))
        return not name.startswith(allowed)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "w" in str(mode)
            if writes and is_outside(path):
                seen.append(f"opened a file outside to write: {str(path)[-60:]}")
            elif isinstance(path, str) and path in (at.secret, at.canary):
                seen.append("opened another file")
        elif event in STARTS or event.startswith(("socket.", "urllib.", "ftplib.", "smtplib.")):
            if event not in ("socket.__new__", "socket.gethostname"):
                seen.append(f"{event} {str(args)[:60]}")
        elif event in TOUCHES and is_outside(args[0]):
            seen.append(f"{event} {str(args)[:60]}")
        elif event == "import" and str(args[0]).startswith("hostile_payload"):
            seen.append("imported a module that only the file names")
        elif (
            event == "compile"
            and args[0] is not None
            and MARK.encode() in (args[0] if isinstance(args[0], bytes) else str(args[0]).encode())
        ):
            seen.append("compiled what the file says")

    sys.addaudithook(hook)


def fresh(folder: Path) -> Path:
    """Empty a folder for the next case."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    return folder
