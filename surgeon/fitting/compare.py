"""How far a converted network is from its original on the same images, as a number that can be made smaller.

    loss = T²·KL(softmax(a/T) ‖ softmax(b/T)) + S · mean over stages of ‖y − x‖²/‖x‖²

for outputs that are class scores (a: the original's, b: the converted network's), and ‖b − a‖²/‖a‖² for others.

Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531; Romero et al. 2015, FitNets,
arXiv:1412.6550.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.errors import VerifyError
from surgeon.fitting import stages
from surgeon.fitting.measure import is_scores
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.proof.distance import matched

TEMPERATURE = 2.0  # docs/decisions.md has the measurements that both come from
STAGES = 10.0  # S
_SMALL = 1e-12


class Compared:
    """Both networks while they are watched, and how far the student is from the teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module, found: list[stages.Stage]) -> None:
        self.student, self.teacher, self.stages = student, teacher, found
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        after = {call for stage in self.stages for call in stage.after}
        self.before = self.stack.enter_context(stages.watch(self.teacher, {stage.before for stage in self.stages}))
        self.after = self.stack.enter_context(stages.watch(self.student, after))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def loss(self, inputs: Inputs) -> Tensor:
        """Run both networks on the same images."""
        for watch in (self.before, self.after):
            watch.clear()
        with torch.no_grad():
            a = inputs.cast_for(self.teacher).call(self.teacher)
        b = inputs.cast_for(self.student).call(self.student)
        found = [stages.loss(stage, self.before, self.after) for stage in self.stages]
        terms = [STAGES * torch.stack(found).mean()] if found else []
        return sum((*terms, *_outputs_apart(b, a, inputs)), torch.zeros((), device=devices.of(self.student)))


def _outputs_apart(b: Any, a: Any, inputs: Inputs) -> Iterator[Tensor]:
    """Give the loss of every output; a detector's, which vary in number, have none."""
    try:
        pairs = matched(b, a, any_dtype=True)
    except VerifyError:
        return
    for one, target in pairs:
        if is_scores(target, inputs):
            yield _divergence(one, target)
        elif target.is_floating_point():
            yield (one - target).square().sum() / target.square().sum().clamp_min(_SMALL)


def _divergence(b: Tensor, a: Tensor) -> Tensor:
    """T²·KL between class scores, the mean over images or pixels; probabilities are scores once their log is taken."""
    if bool((a >= 0).all()) and torch.allclose(a.sum(1), torch.ones_like(a.sum(1)), atol=1e-3):
        b, a = (p.clamp_min(_SMALL).log() for p in (b, a))
    log_b, log_a = ((scores / TEMPERATURE).log_softmax(1) for scores in (b, a))
    return TEMPERATURE**2 * F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(1).mean()
