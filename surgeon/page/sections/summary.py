"""What this page is about, and what came of it, in a few figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from surgeon.display import gains, words
from surgeon.page.base import Section
from surgeon.page.data import PageData
from surgeon.page.markup import filled
from surgeon.page.rows import TITLES, UNITS, Cost, Costs, Row, is_folded, rows, shown_model, totals
from surgeon.proof.report import Report


@dataclass(frozen=True, slots=True)
class Figure:
    """One headline figure: what it is of, the figure, what else there is to say, and whether it is good or bad."""

    title: str
    figure: str
    says: str = ""
    tone: str = ""


class Summary(Section):
    """What this is, how much of it was swapped, what that costs, and the verdict."""

    title = "Summary"
    anchor = "summary"
    place = 10

    def applies(self, data: PageData) -> bool:
        return bool(data.models)

    def body(self, data: PageData) -> Markup:
        found = rows(data)
        figures = [*_verdict(data.report), *_swapped(found), *_costs(data), *_once_fused(data), *_time(data)]
        return filled("summary.html", data=data, sentence=_sentence(data, found), figures=figures)


def _sentence(data: PageData, found: tuple[Row, ...]) -> str:
    """Say what the page is about."""
    shown = shown_model(data)
    name = shown.name if shown is not None else data.title
    kind = next((one.kind for one in shown.parts if not one.path), "") if shown is not None else ""
    if shown is not None and shown.survey is None:
        return f"{name} is a file that holds a program: it is run, but there are no modules to look at."
    said = f"{name} is a {kind}" if kind else name
    said += f" with {words.convs(len(found))}"
    states = {row.state for row in found}
    if data.plan is None:
        said += "."
    elif "folded" in states:
        said += f". It was converted by the recipe {data.plan.recipe.name}, and its blocks are folded."
    elif not data.is_planned:
        said += f". It was converted by the recipe {data.plan.recipe.name}."
    else:
        said += f". This is what the recipe {data.plan.recipe.name} would make of it; nothing is changed yet."
    if data.plan is not None and data.plan.inputs is not None:
        said += f" Costs are those of one run with the input {data.plan.inputs}."
    elif shown is not None and shown.survey is not None and shown.survey.inputs is not None:
        said += f" Costs are those of one run with the input {shown.survey.inputs}."
    return said


def _verdict(report: Report | None) -> Iterator[Figure]:
    if report is None:
        return
    tone = {"equivalent": "good", "different": "bad", "approximate": "warn"}[report.verdict]
    mark = {"equivalent": "✓", "different": "✗", "approximate": "≈"}[report.verdict]
    failed = [check.name for check in report.checks if not check.passed]
    says = f"all {words.counted(len(report.checks), 'check')} passed" if not failed else f"failed: {', '.join(failed)}"
    if report.first_to_diverge is not None:
        says += f"; first to diverge: {report.first_to_diverge}"
    yield Figure("Verdict", f"{mark} {report.verdict}", says, tone)


def _swapped(found: tuple[Row, ...]) -> Iterator[Figure]:
    swapped = [row for row in found if row.becomes is not None]
    if not swapped:
        blocked = sum(row.state == "blocked" for row in found)
        if found and all(row.state in ("plain", "blocked") for row in found):
            yield Figure(
                "Convs", str(len(found)), f"{blocked} of them cannot be swapped" if blocked else "all can be swapped"
            )
        elif found:
            yield Figure("Convs swapped", f"0 of {len(found)}")
        return
    counts = Counter(str(row.becomes) for row in swapped)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    yield Figure("Convs swapped", f"{len(swapped)} of {len(found)}", kinds)


def _costs(data: PageData) -> Iterator[Figure]:
    for name, cost in totals(data).items():
        yield _changed(TITLES[name], cost, name)


def _changed(title: str, cost: Cost, name: Costs) -> Figure:
    before, after = words.amount(cost.before, UNITS[name]), words.amount(cost.after, UNITS[name])
    if cost.before == cost.after or cost.ratio is None:
        return Figure(title, after, "")
    return Figure(title, f"×{cost.ratio:.2f}", f"{before} → {after}")


def _once_fused(data: PageData) -> Iterator[Figure]:
    """Say what a plan leads to once blocks are folded, where that is something else than what is trained."""
    if data.plan is None or is_folded(data) or not data.plan.swaps:
        return
    gained = data.plan.gained
    if gained.is_folded and gained.macs is not None:
        says = f"parameters {gains.factor(gained.params)}"
        yield Figure("Multiply-adds once fused", gains.factor(gained.macs).split(" ")[0], says)


def _time(data: PageData) -> Iterator[Figure]:
    time = data.plan.time if data.plan is not None else None
    if time is not None:
        says = f"{time.before * 1e3:.3g} → {time.after * 1e3:.3g} ms, both fused, on {time.device}"
        yield Figure("Time", f"×{time.ratio:.2f}", says)
