"""What convert and fuse measure of their own work.

A swap does not change the graph of a network, so the blocks are proved one by one: each is made again in float64 and
compared with the conv it replaces, and the stored block must be that result, rounded once. Then the whole network is
run before and after, which shows whether a conv is used in a way that the graph does not show.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from surgeon.analysis import rewritten as graph
from surgeon.analysis.network import Network
from surgeon.blocks.contract import broken
from surgeon.conv import numbers
from surgeon.errors import CaptureError, PassError, PlanError, VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.devices import dtype_of
from surgeon.models.memory import give_back_after
from surgeon.models.progress import Progress
from surgeon.proof import calls
from surgeon.proof.distance import (
    EXACT,
    as_double,
    dtype_name,
    has_numbers,
    is_matched,
    pooled,
    tensors,
    widened,
    worst,
)
from surgeon.proof.ulps import Jitter, worst_ulps
from surgeon.surgery.operate import Swap, build, keep_seams, stream_
from surgeon.surgery.permute import Permuted, permute_
from surgeon.surgery.plan import Plan

# Relative L2 that no rounding explains once every block is proved; a norm that is applied twice or never causes more.
_GROSS = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.9, torch.bfloat16: 0.9}
_SHAKES = 5  # times that weights are moved
_UNSEEN = "the network uses a conv in a way that its graph does not show"
_LEAVE = (
    "Leave out the convs that are used without being called: write a plan, `surgeon plan -o plan.yaml`, and edit it."
)


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What convert measured of its own work, as relative L2 in eval mode.

    `worst`: the worst of the blocks that keep the function, made in float64, against the convs they replace;
    `approximate`: how many do not keep it, by design. `whole`: the whole network before and after, in its own dtype;
    None if no input is known.
    `streams`: the network with octave streams going from conv to conv, against every conv splitting and joining, in
    float64 (in its own dtype if it does not run in float64). `permuted`: the network with its channels permuted against
    the network as it was, in the same way.
    """

    sites: int
    worst: float | None
    worst_path: str | None
    approximate: int
    whole: float | None = None
    streams: float | None = None
    permuted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give what was measured, as it stands in a history."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def check_sites(swaps: Sequence[Swap], seed: int, progress: Progress) -> SelfCheck:
    """Make every block again in float64; compare it with the conv it replaces, and the stored block with it."""
    check = SelfCheck(len(swaps), None, None, sum(not one.entry.keeps_function for one in swaps))
    for i, one in enumerate(swaps):
        progress(f"proving {one.entry.path}", i / len(swaps))
        if one.conv.weight.is_meta:  # no numbers, nothing to measure
            continue
        path, conv = one.entry.path, shadow(one.conv, as_double)
        norm = None if one.norm is None else shadow(one.norm, as_double)
        twin = build(one.entry, conv, norm, seed)
        if not (ulps := worst_ulps(one.block, twin)) <= 1:
            raise broken(
                type(one.block), f"{path} is stored {ulps:.3g} units in the last place away from its float64 twin"
            )
        if one.entry.keeps_function:
            apart = calls.local_distance(twin, conv, norm)
            if not apart <= EXACT:
                raise broken(type(one.block), f"{path} is {apart:.1e} from the conv it replaces, in float64")
            if check.worst is None or apart > check.worst:
                check = replace(check, worst=apart, worst_path=path)
        give_back_after(one.conv.weight)
    return check


@contextlib.contextmanager
def calls_of(modules: Sequence[nn.Module]) -> Iterator[set[int]]:
    """Note which of the modules are called meanwhile, in the model or in a copy of it."""
    called: set[int] = set()
    hooks = [module.register_forward_hook(lambda *_, i=i: called.add(i)) for i, module in enumerate(modules)]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


class _Way(NamedTuple):
    """A way to run a network: the kind of copy, the dtype, and how far apart two runs may then be."""

    copied: Callable[[nn.Module], nn.Module]
    dtype: torch.dtype
    most: float

    def run(self, model: nn.Module, inputs: Inputs, *, seed: int = 0) -> Any:
        return calls.outputs(self.copied(model), inputs, seed=seed, dtype=self.dtype)


def _ways(model: nn.Module) -> tuple[_Way, ...]:
    """List the ways to try: in float64, then with all tensors cast in case dtypes get mixed, then in its own dtype."""
    return (
        _Way(widened, torch.float64, EXACT),
        _Way(lambda net: shadow(net, as_double), torch.float64, EXACT),
        _Way(shadow, dtype_of(model), _gross(model)),
    )


def check_permuted(model: nn.Module, permuted: Sequence[Permuted], inputs: Inputs | None) -> float | None:
    """Compare a network with its channels permuted with the network as it is, on copies.

    Raises:
        CaptureError: it computes something else.
    """
    if inputs is None or any(parameter.is_meta for parameter in model.parameters()):
        return None
    for way in (ways := _ways(model)):
        twin = shadow(model, torch.clone)
        permute_(twin, permuted)
        try:
            expected, found = way.run(model, inputs), way.run(twin, inputs)
        except VerifyError:
            if way is ways[-1]:
                raise
            continue
        apart = worst(found, expected)
        if not apart <= way.most:
            if worst(way.run(model, inputs, seed=1), expected):
                return None  # it draws random numbers in eval mode, and other ones for each channel
            raise CaptureError(
                f"with its channels permuted, the network is {apart:.1e} from what it was: it uses the order of its "
                "channels in a way that its graph does not show",
                todo="Set `low: last` in the recipe, or take `permuted` out of the plan.",
            )
        return apart
    return None


def check_streams(model: nn.Module, split: nn.Module, plan: Plan, network: Network, inputs: Inputs) -> float | None:
    """Compare streams that go from conv to conv with convs that split and join each for itself, in float64."""
    stream_(split, plan, network, only_low_pass=True)
    for way in (ways := _ways(model)):
        try:
            expected = way.run(split, inputs)
            break
        except VerifyError:
            if way is ways[-1]:
                raise
    apart = worst(way.run(model, inputs), expected)
    if not apart <= way.most:
        if worst(way.run(split, inputs, seed=1), expected):
            return None  # it draws random numbers in eval mode, and different ones for two streams
        if (path := _misread(split, plan, network, way, inputs, apart)) is not None:
            raise CaptureError(
                f"the graph of {path or 'the model'} is not what it computes: its forward depends on its inputs' kind",
                todo=keep_seams(plan),
            )
        raise PassError("seams", f"the network without seams is {apart:.1e} from the network with them")
    return apart


def _misread(model: nn.Module, plan: Plan, network: Network, way: _Way, inputs: Inputs, apart: float) -> str | None:
    """Find an island whose unchanged graph, put in its place, alone moves the outputs `apart`."""
    expected = way.run(model, inputs)
    for island in network.islands_after_swaps(model):
        if island.path in plan.rewritten:
            as_graph = shadow(model)
            graph.rewrite_(as_graph.get_submodule(island.path), island.graph)
            if worst(way.run(as_graph, inputs), expected) > apart / 10:
                return island.path
    return None


def run_again(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return calls.outputs(model, inputs)
    except VerifyError as error:
        raise CaptureError(f"{_UNSEEN}: {error.problem}", todo=_LEAVE) from error


def check_whole(
    model: nn.Module,
    original: nn.Module,
    inputs: Inputs,
    before: Any,
    after: Any,
    lost: Sequence[str],
    *,
    approximate: bool,
) -> float:
    """Compare the outputs. Every block has been proved, so a large distance or a `lost` block shows an unseen use."""
    if lost:
        what = f"{lost[0]} has been swapped, but the block in its place is not called"
        raise CaptureError(f"{_UNSEEN}: {what}", todo=_LEAVE)
    try:
        apart = worst(after, before)
    except VerifyError as error:
        raise CaptureError(f"{_UNSEEN}: {error.problem}", todo=_LEAVE) from error
    if not approximate:
        check_finite(model, before, after, "the swaps")
        if is_far(model, original, inputs, before, after):
            raise CaptureError(f"{_UNSEEN}: after the swaps the output is {apart:.1e} from what it was", todo=_LEAVE)
    return apart


def check_finite(model: nn.Module, before: Any, after: Any, what: str) -> None:
    """Refuse what makes a network overflow in its own dtype.

    Raises:
        PlanError: numbers are NaN or infinite after `what`, and none was before.
    """
    finite = [all(bool(t.isfinite().all()) for t in tensors(out) if t.is_floating_point()) for out in (before, after)]
    if finite[0] and not finite[1]:
        dtype = dtype_of(model)
        raise PlanError(
            f"after {what} the network gives NaN or infinite numbers, and it gave none before: in between, numbers go "
            f"beyond the largest one of {dtype_name(dtype)}",
            todo=numbers.WIDER.get(dtype, "Make the weights of its norms smaller."),
        )


def outputs_of(model: nn.Module, inputs: Inputs | None) -> Any:
    """Run the model; None if no input is known, or if no number comes out."""
    if inputs is None or any(parameter.is_meta for parameter in model.parameters()):
        return None
    out = calls.outputs(model, inputs)
    return out if has_numbers(out) else None


def is_far(model: nn.Module, original: nn.Module, inputs: Inputs, before: Any, after: Any) -> bool:
    """Whether outputs are further apart than rounding explains, in a network whose blocks have been proved.

    One unit in the last place of every weight moves the outputs of a few networks by any amount; it is chance how far,
    so that is tried several times. Labels and masks are counted. Where numbers overflow in its own dtype, which need
    not show in labels, the network is compared with the `original` in float64.
    """
    if not _is_beyond(model, inputs, before, after, _gross(model), dtype_of(model)):
        return False
    try:
        exact = [calls.outputs(shadow(net, as_double), inputs, dtype=torch.float64) for net in (original, model)]
    except VerifyError:  # it does not run in float64
        return True
    is_comparable = is_matched(exact[1], exact[0])
    return not is_comparable or _is_beyond(model, inputs, exact[0], exact[1], EXACT, torch.float64)


def is_near(model: nn.Module, before: Any, after: Any) -> bool:
    """Whether outputs are as near to each other as they are in almost every network, without moving weights."""
    least = _gross(model)
    return is_matched(after, before) and all(one.l2 <= least and not one.flips for one in pooled([after], [before]))


def _is_beyond(model: nn.Module, inputs: Inputs, before: Any, after: Any, least: float, dtype: torch.dtype) -> bool:
    """Compare outputs in a dtype with each other, and with what moving weights does there."""
    found = pooled([after], [before])
    most = [replace(one, l2=0.0, flips=0) for one in found]
    for seed in range(_SHAKES):
        pairs = list(zip(found, most, strict=True))
        if all(one.l2 <= max(least, 2 * noise.l2) and one.flips <= noise.flips_allowed(2) for one, noise in pairs):
            return False
        jitter = Jitter(seed, units=1.0, keeps_dtype=dtype == dtype_of(model))
        moved = calls.outputs(shadow(model, jitter), inputs, dtype=dtype)
        if not is_matched(moved, after):  # the shapes of its outputs depend on rounding
            return False
        most = [one.furthest(other) for one, other in zip(most, pooled([moved], [after]), strict=True)]
    return True


def _gross(model: nn.Module) -> float:
    return _GROSS.get(dtype_of(model), math.inf)
