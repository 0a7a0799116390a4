"""The matrices of `kernels` as a picture, PNG or SVG, by matplotlib, which is imported when it is needed.

Nothing of matplotlib's state is left changed, no window is opened, and the same numbers give the same bytes: an SVG has
no date, and its ids are hashes of its content.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgeon.display import heat
from surgeon.display.kernels import UNTRAINED, averages_of, counted, heading, shapes
from surgeon.display.words import size
from surgeon.errors import FigureError, printable

if TYPE_CHECKING:
    from surgeon.figures.kernels import KernelFigures

SUFFIXES = (".png", ".svg")
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "svg.hashsalt": "surgeon",
    "svg.fonttype": "none",
    "figure.facecolor": "white",
    "savefig.facecolor": "auto",
    "savefig.transparent": False,
}
_SAYS_NOTHING: dict[str, dict[str, None]] = {  # of who drew it and when: the same kernels give the same bytes
    "png": {"Software": None},
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
}
_SIDE = 1.9  # inches of a panel
_DOTS = 150  # for each inch
_MOST_DOTS = 2**15  # of a side; Agg draws twice that
_NUMBERED = 11  # rows and columns of a matrix that has room for numbers


@dataclass(frozen=True, slots=True)
class _Row:
    """The panels of one line of the picture; where a network has none, its place stays empty."""

    title: str
    panels: Sequence[tuple[str, heat.Rows] | None]


def check_installed() -> None:
    """Make sure, before any work is done, that pictures can be drawn.

    Raises:
        FigureError: matplotlib is missing.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise FigureError(
            "pictures are drawn by matplotlib, which is not installed",
            todo="Install it with: pip install 'conv-surgeon[plots]'. Without -o, the numbers are printed.",
        ) from error


def write(figures: KernelFigures, path: Path, kind: str, *, layers: bool = False) -> None:
    """Draw the averages of all networks beside each other, untrained ones below; with `layers` every conv as well.

    `kind` is png or svg.
    """
    check_installed()
    names = ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.colors")
    matplotlib, figures_of, agg, colors = (cast(Any, importlib.import_module(name)) for name in names)
    with matplotlib.rc_context():
        matplotlib.rcParams.update({**_usual(matplotlib), **_STYLE})
        rows = _rows(figures, layers=layers)
        columns = len(figures.networks)
        inches = (1.1 + (_SIDE + 0.35) * columns, 0.3 + (_SIDE + 0.45) * len(rows))
        figure = figures_of.Figure(figsize=inches, layout="constrained")
        agg.FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        scale = colors.LinearSegmentedColormap.from_list("surgeon", [_share(one) for one in heat.RAMP])
        image = None
        for line, row in zip(axes, rows, strict=True):
            for place, panel in zip(line, row.panels, strict=True):
                image = _panel(place, panel, scale) or image
            how = {"xycoords": "axes fraction", "rotation": 90, "ha": "center", "va": "center", "parse_math": False}
            line[0].annotate(printable(row.title), (-0.12, 0.5), **how)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        dots = min(_DOTS, int(_MOST_DOTS / max(inches)))
        figure.savefig(path, format=kind, dpi=dots, metadata=_SAYS_NOTHING[kind])


def _usual(matplotlib: Any) -> dict[str, Any]:
    """The settings that matplotlib comes with, whatever the user has changed; its backend stays."""
    return {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}


def _rows(figures: KernelFigures, *, layers: bool) -> list[_Row]:
    """Say what is drawn: a line for each shape of kernels and one for untrained ones, and a line for each conv."""
    rows = []
    for shape in shapes(figures):
        found = {network.label: average for network, average in averages_of(figures, shape)}
        labels = [(network, found.get(network.label)) for network in figures.networks]
        panels = [(heading(network), one.matrix) if one else None for network, one in labels]
        rows.append(_Row(f"{size(shape)}, {counted(list(found.values()))}", panels))
        drawn = [("", one.untrained) if one and one.untrained else None for _, one in labels]
        if any(drawn):
            rows.append(_Row(UNTRAINED, drawn))
    paths = dict.fromkeys(layer.path for network in figures.networks for layer in network.layers) if layers else ()
    for path in paths:
        own = [{layer.path: layer for layer in network.layers}.get(path) for network in figures.networks]
        rows.append(_Row(path, [(one.kind, one.matrix) if one else None for one in own]))
    return rows


def _panel(place: Any, panel: tuple[str, heat.Rows] | None, scale: Any) -> Any:
    """Draw one matrix with its numbers; nothing where there is none."""
    place.set_xticks([])
    place.set_yticks([])
    for side in place.spines.values():
        side.set_visible(False)
    if panel is None:
        return None
    title, rows = panel
    place.set_title(printable(title), fontsize=9, parse_math=False)
    image = place.imshow(rows, cmap=scale, vmin=0, vmax=1)
    if max(len(rows), len(rows[0])) <= _NUMBERED:
        small = 9 if len(rows[0]) <= 3 else 5.5 if len(rows[0]) <= 7 else 3.5
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                ink = "white" if heat.is_dark(value) else "black"
                place.text(x, y, heat.number(value), ha="center", va="center", color=ink, fontsize=small)
    return image


def _share(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = (one / 255 for one in colour)
    return red, green, blue
