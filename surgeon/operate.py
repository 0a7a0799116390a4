"""plan → rewritten model. Decides nothing: whether a swap can be made has been settled by `plans.check`.

Three steps, so that a fault on the way leaves the model as it was: prepare builds every block and touches nothing,
place puts them in, and undo takes them out again. Where there are octave convs, a fourth lets their streams go from
conv to conv.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgeon import seams
from surgeon.blocks import Block
from surgeon.capture import shadow, to_meta
from surgeon.cost import measure
from surgeon.errors import PassError
from surgeon.plans import Entry, Plan, SeamLeft
from surgeon.seams import LowPass, Outcome
from surgeon.sites import Survey


@dataclass(frozen=True, slots=True)
class Swap:
    """What stands at a site, the norm that is taken over, and the block that takes their place."""

    entry: Entry
    conv: nn.Conv2d
    norm: _BatchNorm | None
    block: Block


def operate_(model: nn.Module, plan: Plan) -> Outcome:
    """Carry out a checked plan on `model` itself."""
    place_(model, prepare(model, plan))
    return stream_(model, plan)


def stream_(model: nn.Module, plan: Plan, *, only_low_pass: bool = False) -> Outcome:
    """Take the seams between octave convs out; or, with `only_low_pass`, low-pass what the plan says and leave them."""
    if not plan.has_streams:
        return Outcome()
    low_passes = [LowPass(one.island, one.step, one.operand) for one in plan.low_passed]
    return seams.remove_(model, low_passes, inputs=plan.inputs, only_low_pass=only_low_pass)


def foresee(plan: Plan, survey: Survey) -> Plan:
    """Say in a plan what comes of its octave convs: islands that become graphs, seams that stay, costs of the whole.

    It is carried out on a copy without numbers; on one with numbers where the network looks at them.
    """
    if not plan.has_streams:
        return plan
    model = shadow(survey.model, to_meta)
    outcome = operate_(model, plan)
    try:
        after = measure(model, survey.inputs)
    except Exception:
        model = shadow(survey.model)
        operate_(model, plan)
        after = measure(model, survey.inputs)
    left = tuple(dict.fromkeys(SeamLeft(island=one.island, kind=one.kind, reason=one.reason) for one in outcome.seams))
    changes = {name: getattr(after, name) for name in ("params", "macs", "activations")}
    total = plan.total.model_copy(
        update={
            name: change.model_copy(update={"after": changes[name]})
            for name in changes
            if (change := getattr(plan.total, name)) is not None
        }
    )
    return plan.model_copy(update={"rewritten": outcome.rewritten, "seams": left, "total": total})


def prepare(model: nn.Module, plan: Plan) -> tuple[Swap, ...]:
    """Build the block of every swap in a checked plan."""
    return tuple(_prepare(model, entry, plan.seed) for entry in plan.swaps)


def place_(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the blocks under all names of their convs, and an Identity under all names of the norms taken over."""
    for swap in swaps:
        _set_(model, swap.entry.paths, swap.block)
        if swap.norm is not None:
            _set_(model, swap.entry.takes_norm, nn.Identity().train(swap.norm.training))


def undo_(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the convs and norms back."""
    for swap in swaps:
        _set_(model, swap.entry.paths, swap.conv)
        if swap.norm is not None:
            _set_(model, swap.entry.takes_norm, swap.norm)


def build(entry: Entry, conv: nn.Conv2d, norm: _BatchNorm | None, seed: int) -> Block:
    """Make the block of one entry from the conv (and norm) that it replaces."""
    return entry.block.from_conv(conv, entry.block_options, norm=norm, generator=_generator(seed, entry.path))


def _prepare(model: nn.Module, entry: Entry, seed: int) -> Swap:
    conv = model.get_submodule(entry.path)
    norm = model.get_submodule(entry.takes_norm[0]) if entry.takes_norm else None
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _BatchNorm | None):
        raise PassError("operate", f"{entry.path} or the norm behind it is not what the plan says")
    return Swap(entry, conv, norm, build(entry, conv, norm, seed))


def _set_(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    for path in paths:
        model.set_submodule(path, module)


def _generator(seed: int, path: str) -> torch.Generator:
    """Give each conv its own stream, so that taking one out of a plan does not change the others."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
