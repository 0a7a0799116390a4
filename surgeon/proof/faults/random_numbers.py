"""Random numbers in eval mode: a dropout that stays active, or noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.models.sandbox import quietly
from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.recorder import Recording, draws_nothing, leaves
from surgeon.proof.report import Guess


class RandomNumbers(Hypothesis):
    """B's module gives something else for every seed, though it is in eval mode, and the expected one does not."""

    place = 30

    def guess(self, case: Case) -> Iterator[Guess]:
        if draws_nothing(case.found) or not case.calls:
            return
        if not _is_steady(case.found, case.calls[0]) and _is_steady(case.expected, case.calls[0]):
            outs = [one for _, one in case.maps()]
            zeros = max((float((one == 0).double().mean()) for one in outs if one.numel()), default=0.0)
            what = "a dropout that stays active in eval mode" if zeros > 0.2 else "it draws random numbers in eval mode"
            yield case.guess("random", f"{what}: with another seed, B gives something else")


def _is_steady(module: nn.Module, one: Recording) -> bool:
    """Whether a module gives the same with two seeds."""
    outs = []
    for seed in (1, 2):
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (one.args, one.kwargs))
        with quietly(seed):
            try:
                outs.append(module(*args, **kwargs))
            except Exception:  # it is the user's code, and verify has said that it does not run
                return True
    pairs = zip(leaves(outs[0]), leaves(outs[1]), strict=False)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
