"""Fold all blocks of a network, and measure how far that moves its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from surgeon.analysis.network import Network
from surgeon.errors import PassError, PlanError, VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof.distance import worst
from surgeon.surgery.fold import fold_blocks_, rules_for
from surgeon.surgery.history import Operation, content_hash, history, planned_inputs, record_, versions
from surgeon.surgery.selfcheck import check_finite, is_far, outputs_of


@ordinary()
def fold_all_(
    network: Network, *, dense: bool = False, progress: Progress = silent
) -> tuple[tuple[str, ...], float | None]:
    """Fold, record it in the model's history, and return the names of what was folded and how far the output moved.

    Raises:
        PlanError: the network overflows, or does not run, when its blocks are folded.
        PassError: it moved the output by more than rounding can. The model is as it was.
    """
    model, inputs = network.model, network.inputs
    progress("running the network as it was", 0)
    parent, before = content_hash(model), outputs_of(model, inputs)
    planned = planned_inputs(history(model))  # verify will look at the network with these, too
    progress("folding, and running the network as it is then", 0.5)
    restore, original, rules = _snapshot(model), shadow(model), rules_for(network, dense=dense)
    is_planned = inputs is not None and planned is not None and inputs.text == planned.text
    distance = None
    try:
        folded = fold_blocks_(network if is_planned else Network(model, called_with=planned), dense=dense)
        if before is not None and inputs is not None:
            after = _outputs_now(model, inputs)
            check_finite(model, before, after, "folding")
            distance = worst(after, before)
            if is_far(model, original, inputs, before, after):
                raise PassError("fuse", f"the network is {distance:.1e} from what it was before its blocks were folded")
    except BaseException:
        restore()
        raise
    if folded:
        measured = {"folded": len(folded)} | ({} if distance is None else {"whole": distance})
        record_(model, Operation("fuse", parent, content_hash(model), None, versions(), dense, rules, measured))
    return folded, distance


def _outputs_now(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network that ran before its blocks were folded."""
    try:
        return calls.outputs(model, inputs)
    except VerifyError as error:
        raise PlanError(
            f"with its blocks folded, {error.problem}",
            todo="Change the code that reads what plain convs in place of a block do not have; --dense (in Python, "
            "dense=True) makes one conv of each HetConv, which has all that a conv has.",
        ) from error


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember which modules a model holds, and what they are; returns a function that puts them back.

    Folding changes no tensor, so none is copied.
    """
    held = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]

    def restore() -> None:
        for module, kind, state, children in held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            module._modules.clear()
            module._modules.update(children)

    return restore
