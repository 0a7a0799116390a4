"""plan → rewritten model. Nothing is decided here: `check` has settled whether each swap can be made.

There are three steps, so that an error on the way leaves the model as it was: prepare builds every block and touches
nothing, place puts them in, and undo takes them out again. If there are octave convs, a fourth step lets their streams
go from conv to conv.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from surgeon.analysis import convs, functional
from surgeon.analysis.functional import Functional
from surgeon.analysis.network import Network
from surgeon.blocks import Block, contract, norms
from surgeon.conv.spec import ConvSpec
from surgeon.errors import PassError
from surgeon.models.memory import give_back_after
from surgeon.octave import rewrite as seams
from surgeon.octave.rewrite import LowPass, Outcome
from surgeon.surgery.finite import finite
from surgeon.surgery.permute import digest
from surgeon.surgery.plan import Entry, Plan


@dataclass(frozen=True, slots=True)
class Swap:
    """The conv at a site, the norm that is taken over, and the block that takes their place.

    `norm` is what normalises of the module `behind` the conv; most often that is all of it.
    """

    entry: Entry
    conv: nn.Conv2d  # for a functional convolution, a conv made of its parameters
    norm: nn.Module | None
    behind: nn.Module | None
    block: Block


def operate_(model: nn.Module, plan: Plan, network: Network) -> Outcome:
    """Carry out a checked plan on `model` itself; `network` describes it, or the model it was copied from."""
    place_(model, prepare(model, plan), network)
    return stream_(model, plan, network)


def keep_seams(plan: Plan) -> str:
    """Say how to convert a network in which streams do not go from conv to conv."""
    names = " and ".join(plan.stream_blocks)
    return f"Let each conv split and join for itself: set `seams: keep` among the options of {names} in the recipe."


def stream_(model: nn.Module, plan: Plan, network: Network, *, only_low_pass: bool = False) -> Outcome:
    """Remove the seams between octave convs; with `only_low_pass`, keep them and only low-pass what the plan says."""
    if not plan.has_streams:
        return Outcome()
    low_passes = [LowPass(one.island, one.step, one.operand) for one in plan.low_passed]
    left = {one.island: one.reason for one in plan.seams if one.kind == "local"}
    islands = network.islands_after_swaps(model)
    return seams.remove_(model, islands, low_passes, left=left, only_low_pass=only_low_pass)


def prepare(model: nn.Module, plan: Plan) -> tuple[Swap, ...]:
    """Build the block of every swap in a checked plan."""
    swaps, order = tuple(_prepare(model, entry, plan.seed) for entry in plan.swaps), digest(plan.permuted)
    for swap in swaps if order else ():
        swap.block.permuted_as = order
    return swaps


def place_(model: nn.Module, swaps: Sequence[Swap], network: Network) -> Callable[[], None]:
    """Put the blocks under all names of their convs, and under those of the norms taken over what is left of them.

    Returns a function that puts the convs and norms back.
    """
    lifted = [(_functional(swap.entry), swap.block) for swap in swaps if swap.entry.functional is not None]
    undos = functional.lift_(model, lifted, network.islands) if lifted else []
    for swap in swaps:
        if swap.entry.functional is None:
            _set_(model, swap.entry.paths, swap.block)
        if swap.behind is not None and norms.leaves_rest(swap.behind):
            undos.append(norms.leave_rest_(swap.behind))
        elif swap.behind is not None:
            _set_(model, swap.entry.takes_norm, nn.Identity().train(swap.behind.training))

    def undo() -> None:
        for swap in swaps:
            if swap.entry.functional is None:
                _set_(model, swap.entry.paths, swap.conv)
            if swap.behind is not None:
                _set_(model, swap.entry.takes_norm, swap.behind)
        for one in reversed(undos):
            one()

    return undo


def _functional(entry: Entry) -> Functional:
    step = entry.functional
    assert step is not None
    return Functional(entry.path, step.spec, step.island, step.step, step.weight, step.bias)


def build(entry: Entry, conv: nn.Conv2d, norm: nn.Module | None, seed: int) -> Block:
    """Make the block of one entry from the conv (and norm) that it replaces; it can become that conv's class again."""
    generator, given = _generator(seed, entry.path), conv
    is_own = type(conv) is not nn.Conv2d
    if is_own and isinstance(entry.spec, ConvSpec):
        given = entry.spec.holding(conv)
    block = contract.from_conv(entry.block, given, entry.block_options, norm=norm, generator=generator)
    if is_own:
        vars(block)["origin"] = convs.shell(conv)  # no module of the network
    return block


def _prepare(model: nn.Module, entry: Entry, seed: int) -> Swap:
    conv = _conv_of(model, entry)
    behind = model.get_submodule(entry.takes_norm[0]) if entry.takes_norm else None
    if not isinstance(conv, nn.Conv2d) or not (behind is None or norms.is_batch_norm(behind)):
        raise PassError("operate", f"{entry.path} or the norm behind it is not what the plan says")
    norm = None if behind is None else norms.core_of(behind)
    sources = [conv] if norm is None else [conv, norm]
    block = finite(entry.path, "swapped", partial(build, entry, conv, norm, seed), *sources, keeps_nan=True)
    swap = Swap(entry, conv, norm, behind, block)
    give_back_after(conv.weight)
    return swap


def _conv_of(model: nn.Module, entry: Entry) -> nn.Module:
    if entry.functional is None:
        return model.get_submodule(entry.path)
    return functional.conv_of(model, _functional(entry))


def _set_(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    for path in paths:
        model.set_submodule(path, module)


def _generator(seed: int, path: str) -> torch.Generator:
    """Give each conv its own random stream, so that taking one out of a plan does not change the others."""
    digest = hashlib.sha256(f"{seed}:{path}".encode(errors="backslashreplace")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
