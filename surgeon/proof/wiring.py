"""Does the code between the modules do the same in both models?

B is run with the result of every module that both have replaced by A's. Then what reaches the next module, and what
comes out in the end, is A's to the last digits, however the weights are stored: only code can make a difference. In
half types this shows what would drown in the rounding of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.proof.distance import pooled
from surgeon.proof.pairing import is_below
from surgeon.proof.recorder import Recorder

OUTPUT = ""  # stands for the outputs among the names of modules


def wiring(recorder: Recorder, run_b: Callable[[], Any], truth: Any) -> dict[str, float] | None:
    """Give how far what reaches each stretch of B is from what reached A's, and how far the outputs are, as `OUTPUT`.

    None if weights of B lie outside what both models have, since their rounding would show.
    """
    if not _covers(recorder):
        return None
    found: dict[str, float] = {}
    try:
        with recorder.forcing(found):
            out = run_b()
        pairs = pooled([out], [truth])
    except VerifyError:
        return {**found, OUTPUT: math.inf}
    return {**found, OUTPUT: max((math.inf if one.flips else one.l2 for one in pairs), default=0.0)}


def _covers(recorder: Recorder) -> bool:
    """Whether every tensor of B lies in a stretch whose result is replaced, or is A's own."""
    roots = {path for one in recorder.outer() for path in one.in_b}
    if not roots:
        return False
    modules = dict(recorder.a.named_modules(remove_duplicate=False))
    theirs = {there: modules[path] for path, there in recorder.pairing.there.items() if path in modules}
    for path, module in recorder.b.named_modules():
        if not is_below(path, roots) and not _holds_the_same(module, theirs.get(path)):
            return False
    return True


def _holds_the_same(module: nn.Module, other: nn.Module | None) -> bool:
    ours = own_tensors(module)
    theirs = {} if other is None else own_tensors(other)
    return all(name in theirs and _is_equal(tensor, theirs[name]) for name, tensor in ours.items())


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give the tensors of a module without those of its submodules, and without counters, which decide nothing."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor for name, tensor in own if name != "num_batches_tracked"}


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5).to(one.dtype))
