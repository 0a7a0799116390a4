"""Carry out a plan and measure it: build every block, prove it, place it, and run the network before and after."""

from __future__ import annotations

from dataclasses import replace

from surgeon.analysis.network import Network
from surgeon.errors import PlanError
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.surgery.history import Operation, content_hash, record_, versions
from surgeon.surgery.operate import place_, prepare, stream_
from surgeon.surgery.permute import permute_
from surgeon.surgery.plan import Plan
from surgeon.surgery.selfcheck import (
    SelfCheck,
    calls_of,
    check_permuted,
    check_sites,
    check_streams,
    check_whole,
    outputs_of,
    run_again,
)


@ordinary()
def carry_out_(checked: Plan, network: Network, progress: Progress = silent, *, parent: str | None = None) -> SelfCheck:
    """Operate on a network, measure what was done, and record it in the model's history.

    `parent` hashes the model's tensors as they were before what the plan bakes was baked. Channels are permuted before
    anything is swapped, once it is proved on copies that the network then computes the same.

    Raises:
        PlanError: there is nothing to swap. PassError: a block that should keep the function does not.
        CaptureError: the network does more with its convs than its graph shows. The model is as it was.
    """
    if not checked.swaps:
        reasons = list(dict.fromkeys(entry.skip for entry in checked.convs if entry.skip))
        raise PlanError(
            f"nothing is swapped: {'; '.join(reasons[:3]) or 'the model has no convs'}",
            todo="`surgeon plan` gives the reason for every conv.",
        )
    parent = parent or content_hash(network.model)
    progress("permuting channels", 0)
    apart = check_permuted(network.model, checked.permuted, network.inputs) if checked.permuted else None
    undo = permute_(network.model, checked.permuted)
    try:
        return _carry_out_(checked, network, progress, parent, apart)
    except BaseException:
        undo()
        raise


def _carry_out_(checked: Plan, network: Network, progress: Progress, parent: str, permuted: float | None) -> SelfCheck:
    """Swap, measure and record; `permuted` is how far permuting the channels has moved the outputs."""
    model, inputs = network.model, network.inputs
    progress("building blocks", 0.1)
    swaps = prepare(model, checked)
    check = replace(check_sites(swaps, checked.seed, parts(progress, 0.2, 0.5)), permuted=permuted)
    has_numbers = not any(parameter.is_meta for parameter in model.parameters())
    progress("running the network as it was", 0.5)
    with calls_of([one.conv for one in swaps]) as called:
        before = outputs_of(model, inputs) if has_numbers else None
    original = shadow(model)  # which shares its parameters
    progress("placing blocks", 0.65)
    undo = place_(model, swaps, network)
    split = shadow(model) if has_numbers and inputs is not None and checked.has_streams else None
    outcome = stream_(model, checked, network)
    try:
        if split is not None and inputs is not None and outcome.rewritten:
            check = replace(check, streams=check_streams(model, split, checked, network, inputs))
        if before is not None and inputs is not None:
            progress("running the network as it is now", 0.8)
            with calls_of([one.block for one in swaps]) as called_now:
                after = run_again(model, inputs)
            lost = [swaps[i].entry.path for i in sorted(called - called_now)]
            whole = check_whole(*(model, original, inputs, before, after, lost), approximate=bool(check.approximate))
            check = replace(check, whole=whole)
        progress("recording what was done", 0.95)
    except BaseException:
        outcome.undo_()
        undo()
        raise
    made = content_hash(model)
    record_(model, Operation("convert", parent, made, checked.to_dict(), versions(), measured=check.to_dict()))
    return check
