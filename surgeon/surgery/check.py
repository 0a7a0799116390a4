"""Whether a plan, perhaps edited by hand or read from a file, can be carried out on a network as it stands."""

from __future__ import annotations

from pydantic import ValidationError

from surgeon.analysis import fingerprint as fingerprints
from surgeon.analysis.sites import Site, Survey
from surgeon.blocks import contract
from surgeon.errors import PlanError
from surgeon.recipes.forms import plain_words
from surgeon.surgery.plan import Entry, FunctionalStep, Plan


def check(plan: Plan, survey: Survey) -> None:
    """Make sure that a plan, perhaps edited by hand, can be carried out on this model as it stands.

    Raises:
        PlanError: the plan does not fit; the message lists everything that is wrong.
    """
    if not fingerprints.fits(plan.model, survey.model):
        raise PlanError(
            f"the plan is for another network ({plan.model}; this one is {survey.fingerprint})",
            todo="Make one for this network: surgeon plan MODEL --recipe … -o plan.yaml.",
        )
    sites = {site.path: site for site in survey.sites}
    misfits = [f"{entry.path}: {why}" for entry in plan.convs if (why := _misfit(entry, sites.get(entry.path)))]
    seen = [entry.path for entry in plan.convs]
    steps = {(island.path, node.name) for island in survey.network.islands for node in island.graph.nodes}
    misfits += [
        f"low_passed {one.step}: there is no such step that reads {one.operand}"
        for one in plan.low_passed
        if not {(one.island, one.step), (one.island, one.operand)} <= steps
    ]
    misfits += [f"{path}: it is in the plan twice" for path in sorted({p for p in seen if seen.count(p) > 1})]
    if misfits:
        raise PlanError(
            "the plan cannot be carried out as it stands",
            details=misfits,
            todo="Give these convs `skip: reason` instead of `swap`, or take them out of the plan.",
        )


def _misfit(entry: Entry, site: Site | None) -> str | None:
    if site is None:
        return "there is no such conv"
    if entry.swap is None:
        return None
    if entry.functional != FunctionalStep.of(site):
        return "the plan names another step of the network for it"
    if site.spec is None or entry.spec not in (site.spec, fingerprints.words_of(site.spec)):
        return f"the plan says {entry.conv}, the model has {site.spec or site.kind}"
    if set(entry.paths) != set(site.paths):
        return f"the model names it {', '.join(site.paths)}"
    try:
        with plain_words(entry.block.Options):
            options = entry.block_options
    except ValidationError as error:
        return "; ".join(f"with.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    if entry.takes_norm and set(entry.takes_norm) != set(site.norm):
        return f"it cannot take over {entry.takes_norm[0]}" + (f": {site.norm_obstacle}" if site.norm_obstacle else "")
    return site.obstacle or contract.refusal(entry.block, site.spec, site.size, options)
