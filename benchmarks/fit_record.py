"""fit.json: what benchmarks/fit.py has measured so far; several processes may add to it at once."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("fit.json")


def read() -> dict[str, Any]:
    """Give what is known: the networks by name, and the rows by key."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"networks": {}, "rows": {}}


def add(what: str, key: str, found: dict[str, Any]) -> None:
    """Keep a network or a row, in the order of their keys."""
    add_all({what: {key: found}})


def add_all(found: dict[str, dict[str, Any]]) -> None:
    """Keep networks and rows, in the order of their keys."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read()
        known |= {what: dict(sorted((known[what] | more).items())) for what, more in found.items()}
        new = RESULTS.with_suffix(".new")
        new.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, RESULTS)
