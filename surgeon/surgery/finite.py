"""Nothing is made of numbers that are none, and nothing that is made has numbers that its dtype does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from surgeon.conv import numbers
from surgeon.errors import PlanError

Made = TypeVar("Made", bound=nn.Module | None)


def finite(path: str, how: str, make: Callable[[], Made], *sources: nn.Module) -> Made:
    """Make something out of modules, and make sure that their numbers and those of the result are finite.

    Raises:
        PlanError: they are not; the conv at `path` is named, and `how` says what cannot be done with it.
    """
    named = path or "the model"
    held = [(name, t) for source in sources for name, t in (*source.named_parameters(), *source.named_buffers())]
    if why := numbers.fault(held):
        raise PlanError(f"{named} cannot be {how}: {why}", todo=numbers.MEND)
    if any(name.endswith("running_var") and not t.is_meta and bool((t < 0).any()) for name, t in held):
        raise PlanError(f"{named} cannot be {how}: a running variance is negative", todo=numbers.MEND)
    try:
        made = make()
        for name, tensor in made.state_dict().items() if made is not None else ():
            if isinstance(tensor, Tensor) and not numbers.is_finite(tensor):
                raise numbers.beyond(f"its {name}", tensor.dtype)
    except PlanError as error:
        raise PlanError(f"{named} cannot be {how}: {error.problem}", todo=error.todo) from error
    return made
