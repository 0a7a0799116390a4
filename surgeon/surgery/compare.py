"""Two models → Report: what was done to make B of A is done again, and B compared with that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from surgeon.analysis import example as examples
from surgeon.errors import CaptureError, VerifyError
from surgeon.models import devices
from surgeon.models.progress import Progress
from surgeon.models.wrappers import checked
from surgeon.proof import verify as equivalence
from surgeon.proof.report import Report
from surgeon.surgery import history as histories
from surgeon.surgery import replay
from surgeon.surgery.look import inputs_for


def compare(a: nn.Module, b: nn.Module, example: Any, seed: int, progress: Progress) -> Report:
    """Compare two models on one example or a list of them; what a history says is done again to A first."""
    checked(a), checked(b)
    if (place := devices.of(a)) is not None and place.type != "meta":
        b = devices.on(b, place)
    if empty := [name for name, model in (("A", a), ("B", b)) if any(p.is_meta for p in model.parameters())]:
        raise VerifyError(
            f"{' and '.join(empty)}: parameters are on the meta device, and hold no numbers",
            todo="Load its weights first.",
        )
    progress("looking for an input", 0)
    is_list = isinstance(example, list) and not all(isinstance(side, int) for side in example)
    given: Any = example if is_list else [example]
    steps = replay.steps_between(a, b)
    inputs = [inputs_for(b if one is None and steps else a, one, seed=seed) for one in given]
    known = [one for one in inputs if one is not None]
    if not known:
        raise CaptureError("no input is known that the model accepts", todo=examples.PASS_ONE)
    progress("repeating the operations in float64", 0.1)
    again = replay.done_again(a, steps) if replay.can_be_done(steps) else None
    progress("comparing", 0.4)
    is_approximate = any(map(replay.is_approximate, steps))
    reference, taken = replay.as_baked(a, steps)
    try:
        reference = replay.in_order_of(reference, steps, known[0])
    except CaptureError as error:
        found = equivalence.verify(a, b, known, seed=seed)
        return replace(found, remarks=(*found.remarks, f"B's history permutes channels, but {error.problem}"))
    if again is not None and (since := replay.folded_since(again.exact, b)) is not None:
        found = equivalence.verify(a, b, known, seed=seed)
        return replace(found, remarks=(*found.remarks, since))
    found = equivalence.verify(reference, b, known, replay=again, approximate=is_approximate, seed=seed)
    if steps and not found and histories.content_hash(b) != steps[-1].result:
        changed = f"B's tensors were changed after {steps[-1].operation} had made it"
        found = replace(found, remarks=(*found.remarks, changed))
    if taken:
        found = replace(found, remarks=(*found.remarks, f"A is compared with baked tensors in {', '.join(taken)}"))
    if not steps and (lapse := replay.lapse(a, b)) is not None:
        found = replace(found, remarks=(*found.remarks, lapse))
    return found
