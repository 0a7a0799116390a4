"""Where the tensors of a network went when it was converted, and whether that is meant to show in train mode.

A block of branches has the conv's kernel in its first branch, and the norm behind the conv at the end of it. Where that
branch has not all of the kernel, only the shift of the norm does what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from surgeon.blocks.online import Online
from surgeon.blocks.parallel import Parallel
from surgeon.surgery.history import Operation
from surgeon.surgery.plan import Entry, Plan

_OF_NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def came_from(made: nn.Module, steps: Sequence[Operation]) -> dict[str, str]:
    """Give, by the name of a tensor in the original, its name in the network that the steps have made."""
    held = made.state_dict().keys()
    entries = [entry for step in steps if step.plan is not None for entry in Plan.model_validate(step.plan).swaps]
    pairs = [pair for entry in entries for pair in _moves(made, entry)]
    return {name: there for name, there in pairs if there in held}


def keeps_training(steps: Sequence[Operation]) -> bool:
    """Whether everything that was done is meant to leave what the network computes in train mode, too."""
    plans = [None if step.plan is None else Plan.model_validate(step.plan) for step in steps]
    return all(plan is not None and not plan.baked and all(map(_keeps, plan.swaps)) for plan in plans)


def _keeps(entry: Entry) -> bool:
    return entry.block.keeps_training(entry.block_options, with_norm=bool(entry.takes_norm))


def _moves(made: nn.Module, entry: Entry) -> Iterator[tuple[str, str]]:
    block = dict(made.named_modules(remove_duplicate=False)).get(entry.path)
    if isinstance(block, Online):
        yield f"{entry.path}.weight", f"{entry.path}.conv_weight"
    elif isinstance(block, Parallel):
        yield f"{entry.path}.weight", f"{entry.path}.{block.first_conv}.weight"
        norm = entry.takes_norm[0] if entry.takes_norm else None
        if norm is None:
            yield f"{entry.path}.bias", f"{entry.path}.{block.first_norm}.bias"
        is_whole = entry.block_options.model_dump().get("init") == "takeover"
        for name in (_OF_NORMS if is_whole else ("bias",)) if norm is not None else ():
            yield f"{norm}.{name}", f"{entry.path}.{block.first_norm}.{name}"
