"""Does the replay compute what A computes, judged at the sites in which they are not the same anyway?

    ‖replay(x) − A(x)‖ / ‖A(x)‖ ≲ K · max over sites ‖replay's site(xₛ) − A's site(xₛ)‖ / ‖A's site(xₛ)‖

xₛ is what A's site was given in its run, and K how far the network spreads an error of one of its steps. Outside of
those sites both models have the same code and the same numbers, so there is nothing else to run. K is measured: it is
how many times half a unit A's arithmetic is from itself in float64, since every step of A makes such an error.
"""

from __future__ import annotations

import math

from torch import nn

from surgeon.proof.pairing import is_below
from surgeon.proof.recorder import Recorder, Stretch, far_apart, modules_of, run

CLEAR = 0.1  # of its limit: what is nearer to it than that is measured in full


def site_by_site(recorder: Recorder, replay: nn.Module, unlike: list[str] | None) -> float | None:
    """Give the largest relative L2 of the replay's sites, each on what A's was given, in float64.

    `unlike` are the modules in which A and the replay are not certainly the same. None where they lie in no site that
    the run has called, or where B, which is built as the replay, did not call that site as A does.
    """
    if unlike is None or "" in unlike:
        return None
    concerned: list[Stretch] = []
    for path in unlike:
        found = [one for one in recorder.stretches.values() if is_below(path, one.steps)]
        if not found:
            return None
        concerned += found
    apart = 0.0
    for stretch in {one.path: one for one in concerned}.values():
        if not math.isfinite(recorder.propagated_to(stretch)):
            return None
        modules = modules_of(replay, stretch.in_b)
        apart = max([apart, *(far_apart(run(modules, one), one.out) for one in recorder.calls(stretch))])
    return apart
