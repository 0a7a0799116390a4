"""What the user says about images, the same for every command that takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgeon.files.pickles import Trust
from surgeon.fitting import data as sources
from surgeon.fitting.data import Data
from surgeon.models.call import Inputs


@dataclass(frozen=True, slots=True)
class Images:
    """Where images are, how many are taken, how many are run at once, and what is done to them."""

    source: str
    count: int | None = None
    batch: int | None = None
    preprocess: str | None = None
    labels: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """What of the user's text may be files: x.npz:train_x is an array in one."""
        named = [one for one in (self.source, self.labels) if one is not None]
        return (*named, *(one.rpartition(":")[0] for one in named if ":" in one))

    def read(self, model: nn.Module, example: Inputs | None, *, seed: int, trust: Trust) -> Data:
        """Read them for a model; `example` is an input that it is known to take."""
        return sources.read(
            self.source,
            model,
            batch=self.batch,
            images=self.count,
            preprocess=self.preprocess,
            labels=self.labels,
            seed=seed,
            trust=trust,
            example=example,
        )
