"""Nothing is made of numbers that are none, and nothing that is made has numbers that its dtype does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from surgeon.conv import numbers
from surgeon.errors import PlanError

Made = TypeVar("Made", bound=nn.Module | None)


def finite(path: str, how: str, make: Callable[[], Made], *sources: nn.Module, keeps_nan: bool = False) -> Made:
    """Make something out of modules, and make sure that their numbers and those of the result are finite.

    `keeps_nan`: numbers that are not finite already may stay what they are.

    Raises:
        PlanError: they are not; the conv at `path` is named, and `how` says what cannot be done with it.
    """
    named = path or "the model"
    held = [(name, t) for source in sources for name, t in (*source.named_parameters(), *source.named_buffers())]
    if why := numbers.fault(held):
        if keeps_nan:
            return make()
        raise PlanError(f"{named} cannot be {how}: {why}", todo=numbers.MEND)
    variances = [t for name, t in held if name.endswith("running_var") and not t.is_meta]
    if not keeps_nan and any(bool((t < 0).any()) for t in variances):
        raise PlanError(f"{named} cannot be {how}: a running variance is negative", todo=numbers.MEND)
    try:
        made = make()
        for name, tensor in made.state_dict().items() if made is not None else ():
            if isinstance(tensor, Tensor) and not numbers.is_finite(tensor):
                raise numbers.beyond(f"its {name}", tensor.dtype)
    except PlanError as error:
        raise PlanError(f"{named} cannot be {how}: {error.problem}", todo=error.todo) from error
    return made
