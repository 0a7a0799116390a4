"""Fold all blocks of a network, and measure how far that moves its output."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from surgeon.analysis.network import Network
from surgeon.errors import PassError
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof.distance import worst
from surgeon.surgery.fold import fold_blocks_
from surgeon.surgery.history import Operation, content_hash, history, planned_inputs, record_, versions
from surgeon.surgery.selfcheck import check_finite, is_far, outputs_of


@ordinary()
def fold_all_(
    network: Network, *, dense: bool = False, progress: Progress = silent
) -> tuple[tuple[str, ...], float | None]:
    """Fold, record it in the model's history, and return the names of what was folded and how far the output moved.

    Raises:
        PlanError: the network overflows when its blocks are folded.
        PassError: it moved the output by more than rounding can. The model is as it was.
    """
    model, inputs = network.model, network.inputs
    progress("running the network as it was", 0)
    parent, before = content_hash(model), outputs_of(model, inputs)
    planned = planned_inputs(history(model))  # verify will look at the network with these, too
    progress("folding, and running the network as it is then", 0.5)
    restore, original = _snapshot(model), shadow(model)
    is_planned = inputs is not None and planned is not None and inputs.text == planned.text
    distance = None
    try:
        folded = fold_blocks_(network if is_planned else Network(model, called_with=planned), dense=dense)
        if before is not None and inputs is not None:
            after = calls.outputs(model, inputs)
            check_finite(model, before, after, "folding")
            distance = worst(after, before)
            if is_far(model, original, inputs, before, after):
                raise PassError("fuse", f"the network is {distance:.1e} from what it was before its blocks were folded")
    except BaseException:
        restore()
        raise
    if folded:
        measured = {"folded": len(folded)} | ({} if distance is None else {"whole": distance})
        record_(model, Operation("fuse", parent, content_hash(model), None, versions(), dense, measured))
    return folded, distance


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
            if isinstance(module, fx.GraphModule):  # its class holds the code of its graph
                module.recompile()

    return restore
