"""What `fuse --tune` has measured: every block in each form in which it can be deployed, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgeon.blocks.base import PLAIN

NOISE = 0.03  # how much faster, or slower, something has to be to count; half of that shows in any two equal runs


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """One block: the form that was kept, and the seconds that a call takes in each form.

    `ratio` is the time of what was kept over that of the plain form, and `to_original` over that of a conv like the one
    that the block stands for; both are medians of ratios within a round.
    """

    path: str
    block: str  # as recipes name it
    form: str
    seconds: Mapping[str, float]
    ratio: float
    original: float | None = None  # seconds of such a conv
    to_original: float | None = None
    is_slower: bool = False  # than such a conv, by more than noise
    is_original: bool = False  # what was kept is such a conv

    @property
    def is_plain(self) -> bool:
        return self.form == PLAIN


@dataclass(frozen=True, slots=True)
class Tuned:
    """All blocks that were measured, where, and what the network gains: its time over that with all forms plain."""

    blocks: tuple[TunedBlock, ...]
    device: str
    threads: int
    input: str
    channels_last: bool
    dtype: str
    ratio: float | None = None  # None: nothing was changed
    is_undone: bool = False  # the whole network was not faster, so all forms are plain

    @property
    def forms(self) -> dict[str, str]:
        """The form of every block that is not deployed in the plain one, by name."""
        return {} if self.is_undone else {one.path: one.form for one in self.blocks if not one.is_plain}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def record(self) -> dict[str, Any]:
        """What a history keeps: where it was measured, and the ratios."""
        kept: dict[str, Any] = {"device": self.device, "threads": self.threads, "input": self.input}
        kept |= {"channels_last": self.channels_last, "dtype": self.dtype, "network": self.ratio}
        return kept | {"blocks": {one.path: [one.form, one.ratio, one.to_original] for one in self.blocks}}
