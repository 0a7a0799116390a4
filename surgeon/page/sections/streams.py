"""Octave streams: how two streams go from conv to conv, and where they have to be joined."""

from __future__ import annotations

from markupsafe import Markup

from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.flow import Flow
from surgeon.page.lanes import drawing
from surgeon.page.markup import filled
from surgeon.surgery.plan import Plan


class Streams(Section):
    """The way of the high and the low stream through each island, with all seams and their reasons."""

    title = "Octave streams"
    anchor = "streams"
    place = 30

    def applies(self, data: PageData) -> bool:
        return bool(data.flows) or (data.plan is not None and data.plan.has_streams)

    def body(self, data: PageData) -> Markup:
        flows = []
        for flow in data.flows:
            reasons = _reasons(flow, data.plan)
            flows.append((flow, drawing(flow, reasons), reasons))
        plan = data.plan
        kinds = {"join": "joined", "split": "split", "local": "every conv splits and joins"}
        seams = [(kinds[one.kind], one.island, one.reason) for one in plan.seams] if plan is not None else []
        passed = [] if plan is None else [one.said or f"{one.operand} at {one.step}" for one in plan.low_passed]
        return filled("streams.html", flows=flows, seams=seams, passed=passed)


def _reasons(flow: Flow, plan: Plan | None) -> dict[int, str]:
    """Say why two streams are joined or split at a step: the seam that names what reads it, or the next in order."""
    found: dict[int, str] = {}
    for kind in ("join", "split"):
        told = [one.reason for one in plan.seams if one.island == flow.island and one.kind == kind] if plan else []
        places = [i for i, step in enumerate(flow.steps) if step.kind == kind]
        for n, place in enumerate(places):
            readers = {name for one in flow.steps if place in one.reads for name in (one.name, *one.paths)}
            named = [one for one in told if any(f"'{name}'" in one for name in readers)]
            in_order = told[n : n + 1] if len(told) == len(places) else []
            if reason := next(iter((*named, *in_order)), None):
                found[place] = reason
    return found
