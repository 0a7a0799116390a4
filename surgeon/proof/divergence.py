"""Where two models diverge: one row for every site, in order of execution."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import astuple

from surgeon.proof.recorder import Gap
from surgeon.proof.report import SiteDistance
from surgeon.proof.runs import Evidence


def site_table(
    evidence: Evidence, kinds: Mapping[str, tuple[str, str]], *, approximate: bool, judge: bool
) -> tuple[SiteDistance, ...]:
    """List the sites in order of execution, each with its worst run; then those that no run has called.

    `kinds`: site → its class in A and in B. A site can diverge only if the models do: `judge` says that they are
    different.
    """
    gaps: dict[str, Gap] = {}
    for run in evidence.runs:
        for path, gap in run.sites.items():
            gaps[path] = Gap(*map(max, astuple(gaps.get(path, gap)), astuple(gap)))
    stored = _by_site(evidence.ulps or {}, kinds)
    rows = []
    for path in dict.fromkeys([*gaps, *stored]):
        gap = gaps.get(path, Gap(0.0, 0.0, 0.0))
        own = stored.get(path, 0.0) if evidence.ulps is not None else None
        limit = evidence.margin * gap.jitter + evidence.arithmetic
        diverges = judge and (own > 1 if own is not None else not approximate and gap.isolated > limit)
        rows.append(SiteDistance(path, *kinds.get(path, ("", "")), gap.isolated, gap.propagated, own, diverges))
    return tuple(rows)


def _by_site(ulps: Mapping[str, float], sites: Collection[str]) -> dict[str, float]:
    """Give each stored tensor to the site that holds it, or to its module; only sites and wrong tensors are kept."""
    found: dict[str, float] = {}
    for key, value in ulps.items():
        holders = [key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1)]
        path = next((holder for holder in holders if holder in sites), holders[0] if holders else key)
        if path in sites or value > 1:
            found[path] = max(found.get(path, 0.0), value)
    return found
