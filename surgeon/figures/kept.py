"""What share of a trained kernel's energy off its centre a thinned-out block has kept, as the plan has measured it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgeon.surgery import history as histories
from surgeon.surgery.plan import Entry, Plan


@dataclass(frozen=True, slots=True)
class KeptEnergy:
    """What a block keeps of the conv that it replaced, for each way of thinning it out that was measured.

    `way` is the one that was carried out, and `share` what it keeps.
    """

    path: str
    kind: str
    way: str
    share: float
    ways: dict[str, float]


def kept_in_history(model: nn.Module) -> tuple[KeptEnergy, ...]:
    """Read what the plans in the history of a model have measured; nothing where it has none."""
    plans = [Plan.model_validate(step.plan) for step in histories.history(model) if step.plan]
    found = [_kept(entry) for plan in plans for entry in plan.convs]
    return tuple(one for one in found if one is not None)


def _kept(entry: Entry) -> KeptEnergy | None:
    ways = entry.kept_energy
    if not ways or entry.swap is None:
        return None
    said = entry.block_options.model_dump().values()
    way = next((str(value) for value in said if isinstance(value, str) and value in ways), "")
    return KeptEnergy(entry.path, entry.swap, way, ways[way], dict(ways)) if way else None
