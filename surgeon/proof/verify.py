"""Two models → report: do they compute the same, how far are they apart, and where do they diverge.

It answers two questions, in eval mode, on copies:

1. Is the mathematics right? If it is known how B was made from A, the same is done to A in float64. The result (the
   replay, which the caller hands in) must agree with A (checks `mathematics` and `blocks`). Then every tensor stored in
   B must be the replay's, rounded once (`stored tensors`), and B must compute what the replay computes with B's tensors
   (`modules`). For any other pair of models both run in float64 as stored, and their difference must be explained by
   `storage`.
2. How far did rounding move it? In their own dtype, B may be m times as far from the float64 A as A itself is
   (`rounding`).

Each check is a file in the folder `checks`, which states its equation. Relative L2 is ‖b − a‖ / ‖a‖ over all elements
of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.devices import dtype_of
from surgeon.proof.checks import checks
from surgeon.proof.distance import dtype_name
from surgeon.proof.divergence import site_table
from surgeon.proof.report import Report
from surgeon.proof.runs import Measured, Models, NotInFloat64Error, Replay
from surgeon.proof.ulps import stored_ulps


def verify(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Inputs],
    *,
    replay: Replay | None = None,
    approximate: bool = False,
    seed: int = 0,
) -> Report:
    """Compare B with A on each of the inputs; neither is changed, whatever mode it is in.

    `approximate` says that B was not meant to compute what A does; then only its stored tensors are judged.

    Raises:
        VerifyError: the outputs differ in structure, shape or dtype, or a model does not run.
    """
    models = Models(a, b, replay, seed, torch.float64)
    own = dtype_name(models.dtype)
    if (other := dtype_of(b)) != models.dtype:
        raise VerifyError(
            f"A is stored in {own} and B in {dtype_name(other)}", todo="Save both in the same dtype to compare them."
        )
    ulps = stored_ulps(b, replay.rounded) if replay is not None else None
    remarks = []
    try:
        evidence = models.evidence(inputs, ulps)
    except NotInFloat64Error as error:
        models = Models(a, b, replay, seed, models.dtype)
        evidence = models.evidence(inputs, ulps)
        remarks.append(f"A does not run in float64 ({error}), so outputs were compared in {own}")
    found = checks(evidence, approximate=approximate)
    passed = all(check.passed for check in found)
    return Report(
        verdict="different" if not passed else "approximate" if approximate else "equivalent",
        dtype=own,
        checks=tuple(found),
        distances=tuple(run.distance for run in evidence.runs if run.distance is not None),
        sites=site_table(evidence, models.kinds, approximate=approximate, judge=not passed),
        remarks=(*remarks, *_remarks(evidence.runs)),
    )


def _remarks(runs: Sequence[Measured]) -> Iterator[str]:
    if any(run.odd for run in runs):
        yield "NaN or Inf in the outputs of B"  # where they are not A's, relative L2 is infinite
    if any(run.distance is None for run in runs):
        yield "the shapes of the outputs depend on rounding, so B's were compared with those of the replay alone"
