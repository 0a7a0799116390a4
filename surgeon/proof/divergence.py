"""Where two models diverge: one row for every conv and block, and for whatever else is not what it should be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from surgeon.proof.evidence import Evidence
from surgeon.proof.isolated import Gap
from surgeon.proof.report import SiteDistance
from surgeon.proof.wiring import OUTPUT


def site_table(
    evidence: Evidence, kinds: Mapping[str, tuple[str, str]], sites: Collection[str]
) -> tuple[SiteDistance, ...]:
    """List the sites in order of execution, each with its worst run; then those that no run has called.

    `kinds`: module → its class in A and in B. Of modules that are no site, only those that diverge are listed.
    """
    gaps = _worst(evidence)
    stored = _by_site(evidence, sites)
    faulty = {one.culprit for one in gaps.values() if one.excess > 1} | set(_elsewhere(evidence))
    faulty |= {path for path, (_, is_wrong) in stored.items() if is_wrong}
    rows = []
    for path in dict.fromkeys([*gaps, *stored, *sorted(faulty)]):
        if path in faulty or path in sites:
            gap, (own, _) = gaps.get(path, Gap(0.0, 0.0)), stored.get(path, (0.0, False))
            ulps = own if evidence.stored is not None else None
            rows.append(
                SiteDistance(path, *kinds.get(path, ("", "")), gap.isolated, gap.propagated, ulps, path in faulty)
            )
    return tuple(rows)


def _worst(evidence: Evidence) -> dict[str, Gap]:
    """Take the worst run of every stretch."""
    found: dict[str, Gap] = {}
    for run in evidence.runs:
        for path, gap in run.gaps.items():
            known = found.get(path, gap)
            worse = gap if gap.excess > known.excess else known
            isolated = _larger(known.isolated, gap.isolated)
            found[path] = Gap(isolated, _larger(known.propagated, gap.propagated), worse.excess, worse.culprit)
    return found


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _elsewhere(evidence: Evidence) -> Iterator[str]:
    """Name the modules that are built, called or filled otherwise, whatever they make of what they were given."""
    yield from evidence.structure or {}
    yield from (_module_of(key) for key, one in (evidence.same or {}).items() if one.is_wrong)
    for run in evidence.runs:
        far = {path: one for path, one in (run.wiring or {}).items() if path != OUTPUT}
        if (first := next((path for path, one in far.items() if not one <= evidence.wired), None)) is not None:
            yield first


def _by_site(evidence: Evidence, sites: Collection[str]) -> dict[str, tuple[float, bool]]:
    """Give each stored tensor to the site that holds it, or to its module; only sites and wrong tensors are kept."""
    found: dict[str, tuple[float, bool]] = {}
    for key, one in (evidence.stored or {}).items():
        holders = [key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1)]
        path = next((holder for holder in holders if holder in sites), _module_of(key))
        if path in sites or one.is_wrong:
            ulps, is_wrong = found.get(path, (0.0, False))
            found[path] = (max(ulps, one.ulps), is_wrong or one.is_wrong)
    return found


def _module_of(key: str) -> str:
    """Name the module that a stored tensor belongs to; a tensor of the model itself stands for itself."""
    return key.rpartition(".")[0] or key
