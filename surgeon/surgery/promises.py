"""What blocks that are meant to save time were measured to do, on devices and at batches that were at hand.

Fewer multiply-adds are a promise; whether it holds depends on where a network runs. `promises.json` holds what was
measured, row by row, and nothing in it is guessed. `benchmarks/promises.py` measures, and writes such rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

TABLE = Path(__file__).with_suffix(".json")
HOLDS = 0.97  # a network that is slower by less than noise is not slower
Way = Literal["eager", "CUDA graph", "compiled"]


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast a network with blocks of one kind ran, both as they are deployed: 1 is the speed of the original."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    block: str
    options: str
    network: str
    device: str  # cpu or cuda
    name: str  # of the device
    torch: str
    dtype: str
    batch: int
    way: Way
    train: bool
    speed: float
    surgeon: str  # the version that was measured

    @property
    def place(self) -> tuple[str, ...]:
        """What a new measurement takes the place of an old one by: all but its result and the versions."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("speed", "torch", "surgeon")}
        return tuple(map(str, kept.values()))


@functools.cache
def table(path: Path = TABLE) -> tuple[Measured, ...]:
    """Read all rows."""
    return _ROWS.validate_python(json.loads(path.read_text(encoding="utf-8")))


def broken(blocks: Iterable[str]) -> dict[str, tuple[Measured, ...]]:
    """Give the rows in which a network with such a block was slower than the original, by block."""
    found = {block: tuple(row for row in table() if row.block == block and row.speed < HOLDS) for block in blocks}
    return {block: rows for block, rows in found.items() if rows}


def updated(rows: Sequence[Measured], new: Iterable[Measured]) -> list[Measured]:
    """Put new rows in the place of old ones that were measured alike, and the others behind."""
    known = {row.place: row for row in (*rows, *new)}
    return list(known.values())


def written(rows: Iterable[Measured]) -> str:
    """Write rows as the file holds them, one on a line."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    return "[\n " + ",\n ".join(lines) + "\n]\n"


_ROWS = TypeAdapter(tuple[Measured, ...])
