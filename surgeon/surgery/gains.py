"""What a conversion gains on the clock: the network as it is against the converted one, both as they are deployed."""

from __future__ import annotations

import logging

import torch
from torch import nn

from surgeon.analysis.example import PASS_ONE
from surgeon.analysis.sites import Survey
from surgeon.errors import CaptureError
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate
from surgeon.models.progress import Progress, silent
from surgeon.surgery import bench
from surgeon.surgery.operate import operate_
from surgeon.surgery.plan import Plan, Timed

_log = logging.getLogger("surgeon")


def timed(plan: Plan, survey: Survey, progress: Progress = silent) -> Plan:
    """Carry a plan out on a copy of the network, time both, and add that to the plan.

    Raises:
        CaptureError: no input is known, or the network cannot be timed.
    """
    inputs = can_be_timed(survey.model, survey.inputs)
    if not plan.swaps:
        _log.info("nothing is swapped, so nothing is timed")
        return plan
    converted = duplicate(survey.model)
    operate_(converted, plan, survey.network)
    return compared(plan, survey.model, converted, inputs, progress)


def can_be_timed(model: nn.Module, inputs: Inputs | None) -> Inputs:
    """Give the input that a network is timed with.

    Raises:
        CaptureError: there is none, or the network has no numbers.
    """
    if inputs is None:
        raise CaptureError("no input is known to time the model with", todo=PASS_ONE)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CaptureError("the model has no numbers, so it cannot be timed", todo="Load its weights first.")
    return inputs


def compared(plan: Plan, before: nn.Module, after: nn.Module, inputs: Inputs, progress: Progress = silent) -> Plan:
    """Time a network and the one that a plan has made of it, and add that to the plan."""
    rounds = 15
    models = [("the model as it is", before), ("the converted model", after)]
    first, second = bench.compare(models, inputs, rounds=rounds, progress=progress)
    time = Timed(
        before=first.seconds,
        after=second.seconds,
        ratio=second.time_ratio,
        quartiles=second.quartiles,
        is_reliable=second.is_believable,
        rounds=rounds,
        device=str(devices.of(before) or devices.CPU),
        threads=torch.get_num_threads(),
    )
    return plan.model_copy(update={"time": time})
