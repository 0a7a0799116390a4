"""Which units can share a pass over the images: those whose input does not depend on what the others give.

A unit depends on others if its input changes when all that they give becomes NaN, which no sum, norm or activation
takes away. So a shortcut's conv goes with the first conv of its branch, and branches side by side go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.fitting.units import Unit
from surgeon.fitting.watch import copied, watched
from surgeon.models.call import Inputs

Fits = Callable[[Sequence[Unit]], bool]


def together(units: Sequence[Unit], converted: nn.Module, inputs: Inputs, fits: Fits) -> list[list[Unit]]:
    """Cut units, which are in the order of execution, into runs that share a pass; `fits` says what memory allows."""
    seen: dict[Unit, list[Any]] = {}

    def note(unit: Unit, args: Sequence[Any], _: Any) -> None:
        seen.setdefault(unit, []).append(copied(args))

    watched(converted, [(unit, unit.made) for unit in units], inputs, note)
    groups: list[list[Unit]] = []
    for unit in units:
        now = groups[-1] if groups else []
        if now and fits([*now, unit]) and not _depends(unit, seen[unit], now, converted, inputs):
            now.append(unit)
        else:
            groups.append([unit])
    return groups


def _depends(unit: Unit, before: Sequence[Any], others: Sequence[Unit], converted: nn.Module, inputs: Inputs) -> bool:
    """Whether a unit sees something else when the others give NaN; one that is called twice is taken to depend."""
    if any(one.calls > 1 for one in (unit, *others)):
        return True
    now: list[Any] = []
    hooks = [other.made.register_forward_hook(_spoilt) for other in others]
    try:
        watched(converted, [(unit, unit.made)], inputs, lambda _, args, __: now.append(args), unit.calls)
    except Exception:  # the network looks at what it computes
        return True
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(now), strict=True) if len(now) == len(before) else None
    return pairs is None or not all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)


def _spoilt(_: nn.Module, __: Any, out: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: torch.full_like(tensor, torch.nan), out)
