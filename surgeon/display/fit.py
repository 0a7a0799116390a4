"""What fitting did: every site before and after, and the network beside its original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from pathlib import Path

    from surgeon.fitting.fitted import Fitted


def fit_view(fitted: Fitted, written: Path | None = None) -> RenderableType:
    """A row for each site, then a row for each step of the whole network."""
    sites = words.table("site", "becomes", "error before", "error after")
    for site in fitted.fit.sites:
        sites.add_row(site.path, site.block, f"{site.before:.3f}", f"{site.after:.3f}")
    steps = [("as converted", fitted.fit.before), ("fitted", fitted.fit.after)]
    if fitted.distilled is not None:
        steps.append((f"distilled for {fitted.distilled.steps} steps", fitted.last))
    network = words.table("network", "same class", "relative L2", "accuracy")
    for name, one in steps:
        network.add_row(name, _share(one.agreement), _number(one.relative_l2), _share(one.accuracy))
    lines = [*_lines(fitted), *([f"written: {written}"] if written is not None else [])]
    return Group(sites, Line(""), network, *map(Line, lines))


def fit_data(fitted: Fitted, written: Path) -> dict[str, Any]:
    return {"path": str(written), **fitted.to_dict()}


def _lines(fitted: Fitted) -> Iterator[str]:
    yield f"fitted to {words.counted(fitted.images, 'image')} of {fitted.source}: {fitted.preprocessing}"
    if (accuracy := fitted.last.accuracy_before) is not None:
        yield f"accuracy of the original on them: {accuracy:.1%}"
    norms = "estimated anew, which brought the outputs nearer" if fitted.fit.has_new_statistics else "kept"
    yield f"statistics of norms: {norms}"
    if constant := [site.path for site in fitted.fit.sites if site.constant]:
        yield f"constant in all images, so that what they see there says nothing: features of {', '.join(constant)}"
    if fitted.distilled is not None:
        yield str(fitted.distilled)


def _share(of: float | None) -> str:
    return "" if of is None else f"{of:.1%}"


def _number(of: float | None) -> str:
    return "" if of is None else f"{of:.3f}"
