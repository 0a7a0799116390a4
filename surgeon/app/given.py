"""What the user says about a model, the same for every command."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgeon.files.pickles import Trust
from surgeon.models import devices


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says about a model, the same for every command."""

    arch: str | None = None
    arch_args: tuple[str, ...] = ()
    trust: Trust = field(default_factory=Trust)
    inputs: tuple[str, ...] = ()  # examples, as `--input` takes them
    seed: int = 0
    device: torch.device = devices.CPU  # where models are run
    weights: str | None = None  # which weights of a checkpoint to take
