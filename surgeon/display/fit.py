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
    if fitted.distilled is not None and fitted.trained is not None:
        steps.append((f"distilled for {fitted.distilled.steps} steps", fitted.trained))
    network = words.table("network", "same class", "relative L2", "accuracy")
    for name, one in steps:
        network.add_row(name, _share(one.agreement), _number(one.relative_l2), _share(one.accuracy))
    lines = [*_lines(fitted), *([f"written: {written}"] if written is not None else [])]
    return Group(sites, Line(""), network, *map(Line, lines))


def fit_data(fitted: Fitted, written: Path) -> dict[str, Any]:
    return {"path": str(written), **fitted.to_dict()}


def _lines(fitted: Fitted) -> Iterator[str]:
    yield f"fitted to {fitted.source}: {fitted.preprocessing}"
    accuracy = fitted.last.accuracy_before
    yield "all figures are of the images that it was fitted to; on others they are lower" + (
        "" if accuracy is None else f" (accuracy of the original on them: {accuracy:.1%})"
    )
    if fitted.fit.has_new_statistics:
        yield "the running statistics of its norms were estimated anew, which brought the outputs nearer"
    if fitted.fit.left:
        yield f"not fitted, since the images say too little about them: {', '.join(fitted.fit.left)}; give more images"
    if constant := [site.path for site in fitted.fit.sites if site.constant]:
        yield f"some inputs are the same in all images, and the taps for them stay as they were: {', '.join(constant)}"
    if fitted.distilled is not None:
        yield str(fitted.distilled)
        if not fitted.is_trained:
            yield "distilled it is further from the original on these images, so it is left as fitted"


def _share(of: float | None) -> str:
    return "" if of is None else f"{of:.1%}"


def _number(of: float | None) -> str:
    return "" if of is None else f"{of:.3f}"
