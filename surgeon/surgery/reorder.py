"""Weights of a network that was converted, in the order of channels that the conversion has made; and back again.

A conversion may permute channels (`low: least`). It leaves all keys and shapes as they are, so weights of the original
network would load, with other channels low than those that were chosen. Its blocks refuse them; this brings them over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from surgeon.blocks.base import Operator, ordered_as, with_orders
from surgeon.errors import PlanError
from surgeon.surgery.history import history
from surgeon.surgery.permute import Permuted, digest, permuted_state
from surgeon.surgery.plan import Plan


def reordered(
    state: Mapping[str, Any], how: nn.Module | Plan, *, back: bool = False, is_done: bool = False
) -> OrderedDict[str, Any]:
    """Give a state dict of the original network with its channels permuted as a conversion has permuted them.

    `how` is the converted network, or the plan that it was converted with. With `back`, a state dict of the converted
    network is given the original order. With `is_done` its tensors are left as they are: they have the new order, but
    come from a file that does not say so.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> state = reordered(model.state_dict(), model)  # nothing was permuted
    >>> bool((state["0.weight"] == model[0].weight).all())
    True

    Raises:
        PlanError: the weights say that they have the new order already, or some of them are missing.
    """
    permuted, orders = _of_plan(how) if isinstance(how, Plan) else _of_model(how)
    if not permuted:
        return with_orders(state, {})
    if not (back or is_done) and ordered_as(state) & {*orders.values()}:
        raise PlanError(
            "the channels of these weights have the order of the converted network already",
            todo="Load them as they are; with back=True they get the order of the original network.",
        )
    made = state if is_done else permuted_state(state, [one.back for one in reversed(permuted)] if back else permuted)
    return with_orders(made, dict.fromkeys(orders, "") if back else orders)


def _of_plan(plan: Plan) -> tuple[Sequence[Permuted], dict[str, str]]:
    return plan.permuted, {path: digest(plan.permuted) for entry in plan.swaps for path in entry.paths}


def _of_model(model: nn.Module) -> tuple[Sequence[Permuted], dict[str, str]]:
    plans = [Plan.model_validate(step.plan) for step in history(model) if step.plan is not None]
    blocks = {path: one for path, one in model.named_modules(remove_duplicate=False) if isinstance(one, Operator)}
    orders = {path: block.permuted_as for path, block in blocks.items() if block.permuted_as}
    return [one for plan in plans for one in plan.permuted], orders
