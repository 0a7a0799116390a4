"""What a plan with octave convs leads to: islands that become graphs, seams that stay, costs of the whole network.

None of these can be seen from one conv alone, so the plan is carried out on a copy and the copy is measured.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from surgeon.analysis.sites import Survey
from surgeon.errors import CaptureError
from surgeon.models.copies import shadow, to_meta, where
from surgeon.models.cost import Cost, measure
from surgeon.octave.rewrite import Outcome
from surgeon.surgery.operate import keep_seams, operate_
from surgeon.surgery.plan import Plan, SeamLeft


def foresee(plan: Plan, survey: Survey) -> Plan:
    """Add to a plan what its octave convs lead to: islands that become graphs, seams that stay, costs of the whole.

    It is carried out on a copy; on one without numbers if the network runs without them.
    """
    if not plan.has_streams:
        return plan
    try:
        outcome, after = _tried(plan, survey, to_meta)
    except Exception:
        try:
            outcome, after = _tried(plan, survey, None)
        except Exception as error:
            raise CaptureError(
                f"the network does not run when streams go from conv to conv: {where(error)}",
                todo=keep_seams(plan),
            ) from error
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


def _tried(plan: Plan, survey: Survey, cast: Callable[[Tensor], Tensor] | None) -> tuple[Outcome, Cost]:
    model = shadow(survey.model, cast)
    outcome = operate_(model, plan, survey.network)
    return outcome, measure(model, survey.inputs)
