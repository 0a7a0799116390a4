"""A command that is ended while it writes: what it was writing is whole, or is not there."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from hostile_run import fresh
from jobs import Child
from torch import nn

import surgeon
from surgeon.surgery.history import content_hash

WRITES = {
    "pt": ("convert", "GOOD/large.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", "out.pt"),
    "safetensors": ("convert", "GOOD/large.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", "out.safetensors"),
    "plan": ("plan", "GOOD/large.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", "out.yaml"),
}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}


def make_large(path: Path) -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 256, 3, padding=1), *(nn.Conv2d(256, 256, 3, padding=1) for _ in range(4))]
    torch.save(nn.Sequential(*layers), path)


def begin(arguments: list[str], folder: Path) -> Child:
    def work() -> None:
        os.chdir(folder / "in")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        from surgeon.app import cli

        try:
            cli.main(arguments)
        except SystemExit as error:
            sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else 0)

    return Child.begin(work)


class Course(NamedTuple):
    """How a whole run goes: what comes out, and after how many seconds it is done; and how long it writes."""

    whole: str
    seconds: float
    writing: float


@functools.lru_cache
def reference(form: str, good: Path, folder: Path) -> Course:
    """Run it whole, twice, for the first time is slower."""
    for _ in range(2):
        start = time.monotonic()
        child = begin(arguments_of(form, False, good), fresh(folder))
        first = last = 0.0
        while child.poll() is None:
            names = {file.name for file in (folder / "in").iterdir()}
            first = first or (time.monotonic() if names else 0.0)
            last = time.monotonic() if names - {WRITES[form][-1]} else last
            time.sleep(0.0003)
        if child.returncode:
            raise RuntimeError((folder / "stderr").read_text())
    return Course(state_of(form, folder, good) or "", time.monotonic() - start, max(last - first, 0.001))


def arguments_of(form: str, forced: bool, good: Path) -> list[str]:
    return [argument.replace("GOOD", str(good)) for argument in WRITES[form]] + ["--force"] * forced


def state_of(form: str, folder: Path, good: Path) -> str | None:
    """Say what lies at the output's place; None if nothing does."""
    out = folder / "in" / WRITES[form][-1]
    if not out.exists():
        return None
    if out.read_bytes() == b"old":
        return "old"
    try:
        if form == "plan":
            from surgeon.surgery.plan import read

            return str(read(out).to_dict())[:100_000]
        return content_hash(surgeon.load(out, arch=str(good / "large.pt") if form == "safetensors" else None))
    except surgeon.errors.SurgeonError as error:
        return f"damaged: {error}"


def case(form: str, word: str, forced: bool, dice: random.Random, good: Path, folder: Path) -> dict[str, object]:
    """End it at a moment: half of them anywhere in its run, half of them once it writes."""
    course = reference(form, good, folder)
    fresh(folder)
    out = folder / "in" / WRITES[form][-1]
    if forced:
        out.write_bytes(b"old")
    child = begin(arguments_of(form, forced, good), folder)
    start = time.monotonic()
    if dice.random() < 0.4:
        moment = dice.uniform(0.05, 1.0) * course.seconds
        while time.monotonic() - start < moment and child.poll() is None:
            time.sleep(0.0005)
    else:
        while child.poll() is None and not any(file != out or not forced for file in (folder / "in").iterdir()):
            time.sleep(0.0001)
        time.sleep(dice.uniform(0, 1.1) * course.writing)
    was_running = child.poll() is None
    if was_running:
        os.kill(child.pid, SIGNALS[word])
        child.wait()
    found = state_of(form, folder, good)
    rest = sorted(file.name for file in (folder / "in").iterdir() if file != out)
    faults = []
    if found not in (course.whole, "old" if forced else None):
        faults.append(f"the output is neither whole nor absent: {str(found)[:100]}")
    if word == "TERM" and rest:
        faults.append(f"left behind: {', '.join(rest)}")
    return {
        "faults": faults,
        "was_running": was_running,
        "left": rest,
        "is_whole": found == course.whole,
        "code": child.returncode,
    }
