"""The proof that needs no inputs, as a part of what `verify` measures and says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgeon.models.call import Inputs
from surgeon.proof.every_input import prove
from surgeon.proof.evidence import Evidence
from surgeon.proof.runs import Models

_NOT_CERTAIN = "B's code cannot be compared with the replay's to the end (a hook, say, or an object of its own)"


def with_proof(evidence: Evidence, models: Models, inputs: Inputs) -> Evidence:
    """Compare A and the replay without running inputs; `inputs` say how A is called."""
    if models.replay is None or not models.is_double:
        return evidence
    found = prove(models.double_a, models.replay, models.unlike, inputs)
    if found is not None and found.is_whole and not models.is_built_alike:
        found = replace(found, is_whole=False, in_the_way=_NOT_CERTAIN)
    return replace(evidence, every_input=found)


def of_proof(evidence: Evidence, *, passed: bool) -> Iterator[str]:
    """Say for which inputs the answer holds, and what was in the way of more."""
    found = evidence.every_input
    if found is None:
        yield (
            "nothing was proved for every input: that takes a history which begins at A, and folded or swapped convs "
            "of known classes in code that can be traced"
        )
    elif found.is_whole and passed:
        where = "in eval mode " * any(step.mode == "train" for step in evidence.steps)
        yield (
            f"{where}A and B are equal for every input, not only for those that were run: what was folded has the same "
            "operators, and all else is the same steps with the same numbers; B is that, rounded once"
        )
    elif passed:
        named = ", ".join(found.unknown[:3]) + ", …" * (len(found.unknown) > 3)
        why = f"nothing was proved of {named}" if named else found.in_the_way
        yield f"what `operators` counts is equal for every input; the networks are for those that were run: {why}"
