"""Look at a model: with the example that was given, the one of its plan or history, or one that it accepts."""

from __future__ import annotations

from torch import nn

from surgeon.analysis import example as examples
from surgeon.analysis.example import Example
from surgeon.analysis.network import Network
from surgeon.models.call import Inputs
from surgeon.models.wrappers import checked
from surgeon.surgery import history as histories
from surgeon.surgery.plan import Plan


def inputs_for(model: nn.Module, example: Example | None, *, plan: Plan | None = None, seed: int = 0) -> Inputs | None:
    """Take the example that was given, or that of the plan or the model's history, or one that the model accepts."""
    return network_for(model, example, plan=plan, seed=seed).inputs


def network_for(model: nn.Module, example: Example | None, *, plan: Plan | None = None, seed: int = 0) -> Network:
    """Look at a model with the example that was given, or with the first known one that the model accepts."""
    checked(model)
    if example is not None:
        return Network(model, examples.make(example, seed=seed))
    records = [plan.input] if plan is not None else []
    records += [step.plan.get("input") for step in reversed(histories.history(model)) if step.plan][:3]
    return examples.look(model, records, seed=seed)
