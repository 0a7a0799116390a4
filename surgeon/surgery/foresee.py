"""What a plan with octave convs leads to: islands that become graphs, seams that stay, costs of the whole network.

None of these can be seen from one conv alone, so the plan is carried out on a copy, and the copy is run: in eval mode,
which is measured, and in train mode. An island that does not run as a graph, or of whose class other code uses more
than its call, stays as it is, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from surgeon._torch_compat import pytree
from surgeon.analysis.sites import Survey
from surgeon.analysis.uses import used_of_its_class
from surgeon.errors import CaptureError
from surgeon.models.copies import in_mode, shadow, to_meta, where
from surgeon.models.cost import Cost, measure
from surgeon.models.sandbox import quietly
from surgeon.octave.rewrite import Outcome
from surgeon.surgery.operate import keep_seams, operate_
from surgeon.surgery.plan import Plan, SeamLeft
from surgeon.surgery.worth import saves_little

Cast = Callable[[Tensor], Tensor]


def foresee(plan: Plan, survey: Survey) -> Plan:
    """Add to a plan what its octave convs lead to: islands that become graphs, seams that stay, costs of the whole.

    It also says if a plan that was meant to save saves little, and why. The plan is carried out on a copy; on one
    without numbers if the network runs without them.
    """
    made = _with_streams(plan, survey) if plan.has_streams else plan
    return made.model_copy(update={"saves_little": saves_little(made)})


def _with_streams(plan: Plan, survey: Survey) -> Plan:
    """Say which islands of a plan with octave convs become graphs, which seams stay, and what the whole costs."""
    paths = [island.path for island in survey.network.islands]
    left = {one.island: one.reason for one in plan.seams if one.kind == "local"}  # in a plan that was made before
    left |= {path: why for path in paths if (why := used_of_its_class(survey.model, path))}
    try:
        outcome, after = _tried(plan, survey, left)
    except Exception as error:
        outcome, after = _tried_without_culprit(plan, survey, left, error)
    seams = tuple(dict.fromkeys(SeamLeft(island=one.island, kind=one.kind, reason=one.reason) for one in outcome.seams))
    changes = {name: getattr(after, name) for name in ("params", "macs", "activations")}
    total = plan.total.model_copy(
        update={
            name: change.model_copy(update={"after": changes[name]})
            for name in changes
            if (change := getattr(plan.total, name)) is not None
        }
    )
    return plan.model_copy(update={"rewritten": outcome.rewritten, "seams": seams, "total": total})


def _tried(plan: Plan, survey: Survey, left: Mapping[str, str]) -> tuple[Outcome, Cost]:
    """Carry a plan out on a copy, with the islands that are `left` as they are, and run the copy in both modes."""
    seams = tuple(SeamLeft(island=path, kind="local", reason=why) for path, why in left.items())
    plan = plan.model_copy(update={"seams": seams})
    try:
        model = shadow(survey.model, to_meta)
        outcome = operate_(model, plan, survey.network)
        after = measure(model, survey.inputs)
    except Exception:
        model = shadow(survey.model)
        outcome = operate_(model, plan, survey.network)
        after = measure(model, survey.inputs)
    if outcome.rewritten and (error := _untrainable(survey, plan)) is not None:
        raise error
    return outcome, after


def _tried_without_culprit(
    plan: Plan, survey: Survey, left: Mapping[str, str], error: Exception
) -> tuple[Outcome, Cost]:
    """Find the island whose graph does not run, and leave it as it is; all of them, if it is not one alone."""
    why = f"as a graph it does not run: {where(error)}"
    paths = [island.path for island in survey.network.islands if island.path not in left]
    for found in (*([path] for path in paths), paths):
        try:
            return _tried(plan, survey, {**left, **dict.fromkeys(found, why)})
        except Exception:  # it is another one
            continue
    raise CaptureError(
        f"the network does not run when streams go from conv to conv: {where(error)}", todo=keep_seams(plan)
    ) from error


def _untrainable(survey: Survey, plan: Plan) -> Exception | None:
    """Give the error of a run in train mode that the network as it was does not raise; one that it does says nothing.

    It is run without numbers, and with them where it does not run without.
    """
    for cast in (to_meta, torch.clone):
        if (error := _error_in_training(survey, cast, plan)) is None:
            return None
        if _error_in_training(survey, cast, None) is None:
            return error
    return None


def _error_in_training(survey: Survey, cast: Cast, plan: Plan | None) -> Exception | None:
    """Run a copy of the network, with a plan carried out on it, forwards and backwards; returns what it raises."""
    if survey.inputs is None:
        return None
    model = shadow(survey.model, cast)
    inputs = survey.inputs.on_meta() if cast is to_meta else survey.inputs
    try:
        if plan is not None:
            operate_(model, plan, survey.network)
        with quietly(), torch.enable_grad():
            made = pytree.tree_leaves(inputs.cast_for(model).call(in_mode(model, True)))
            if trained := [one.sum() for one in made if isinstance(one, Tensor) and one.requires_grad]:
                torch.autograd.backward(trained, [torch.ones_like(one) for one in trained])
    except Exception as error:
        return error
    return None
