"""Kernels of networks: matrices as heat maps, and scales, energies and spectra as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.heat import Panel, Panels
from surgeon.display.sheet import Column, Line, Listing, Sheet

if TYPE_CHECKING:
    from surgeon.figures.kernels import KernelFigures, NetworkKernels
    from surgeon.figures.magnitudes import AverageMagnitude, LayerMagnitude

_BARS = "▁▂▃▄▅▆▇█"
UNTRAINED = "untrained"
_SAYS = "mean of |F| summed over filters and channels, divided by its largest entry"


def kernels_view(figures: KernelFigures, *, layers: bool = False) -> RenderableType:
    """Show matrices side by side, and what else is known; with `layers` of every conv as well."""
    parts: list[RenderableType] = []
    for shape in shapes(figures):
        parts += [*_averages(figures, shape), Line("")]
    if layers:
        parts += _layers(figures)
    for network in figures.networks:
        title = f"{network.label} " if len(figures.networks) > 1 else ""
        most = None if layers else words.MOST_ROWS
        for table in (_scales(network, title, most), _kept(network, title, most), _spectra(network, title, most)):
            parts += [*table, Line("")] if table else []
        parts += [*_left_out(network, title), Line("")] if network.left_out else []
    return Group(*parts[:-1])


def shapes(figures: KernelFigures) -> list[tuple[int, int]]:
    """List the shapes of kernels of all networks, each once, in their order."""
    found = (average.shape for network in figures.networks for average in network.averages)
    return sorted(dict.fromkeys(found), key=lambda shape: shape != (3, 3))


def heading(network: NetworkKernels) -> str:
    return f"{network.label} {network.name}"


def counted(averages: Sequence[AverageMagnitude]) -> str:
    """Say of how many convs each network has the mean."""
    counts = [average.layers for average in averages]
    if len(set(counts)) == 1:
        return words.convs(counts[0])
    return f"{', '.join(map(str, counts))} convs"


def averages_of(figures: KernelFigures, shape: tuple[int, int]) -> list[tuple[NetworkKernels, AverageMagnitude]]:
    """Give the matrix of each network that has kernels of a shape."""
    return [(one, average) for one in figures.networks for average in one.averages if average.shape == shape]


def _averages(figures: KernelFigures, shape: tuple[int, int]) -> Iterator[RenderableType]:
    found = averages_of(figures, shape)
    title = f"{words.size(shape)} kernels, {counted([average for _, average in found])}: {_SAYS}"
    yield Line(title, mark="")
    trained = [Panel(heading(network), average.matrix) for network, average in found]
    drawn = [
        Panel(f"{network.label} {UNTRAINED}", average.untrained)
        for network, average in found
        if average.untrained is not None
    ]
    if len(found) == 1:
        yield Panels([*trained, *drawn])
        return
    yield Panels(trained)
    if drawn:
        yield Line("")
        yield Panels(drawn)


def _layers(figures: KernelFigures) -> Iterator[RenderableType]:
    """Show every conv: what it computes with in each network, an untrained one, and its branches."""
    by_path: dict[str, list[tuple[NetworkKernels, LayerMagnitude]]] = {}
    for network in figures.networks:
        for layer in network.layers:
            by_path.setdefault(layer.path, []).append((network, layer))
    for path, found in by_path.items():
        kinds = dict.fromkeys(f"{layer.kind} {layer.geometry}" for _, layer in found)
        yield Line(f"{path}: {'; '.join(kinds)}")
        panels = []
        for network, layer in found:
            panels.append(Panel(network.label, layer.matrix))
            if layer.untrained is not None:
                panels.append(Panel(f"{network.label} {UNTRAINED}", layer.untrained))
            panels += [Panel(f"{network.label} {one.name} ×{one.share:.2f}", one.matrix) for one in layer.branches]
        yield Panels(panels)
        yield Line("")


def _scales(network: NetworkKernels, title: str, most: int | None) -> list[RenderableType]:
    """A row for each block: the mean |γ|/σ of each of its branches."""
    if not network.scales:
        return []
    names = list(dict.fromkeys(branch.name for layer in network.scales for branch in layer.branches))
    table = Sheet([Column("block", ""), *(Column(name, f"{name} ", is_number=True) for name in names)])
    for layer in network.scales[:most]:
        worth = {branch.name: f"{branch.folded.mean:.3g}" for branch in layer.branches}
        table.add_row(layer.path, *(worth.get(name, "") for name in names))
    table.caption = _more(len(network.scales), most)
    return [Line(f"{title}mean |γ|/σ of each branch: by how much its kernel counts in the folded one"), table]


def _kept(network: NetworkKernels, title: str, most: int | None) -> list[RenderableType]:
    if not network.kept:
        return []
    table = Sheet([Column("block", ""), Column("layout", "layout "), *_numbers("kept"), Column("others", "others ")])
    for one in network.kept[:most]:
        others = ", ".join(f"{way} {share:.0%}" for way, share in one.ways.items() if way != one.way)
        table.add_row(one.path, one.way, f"{one.share:.1%}", others)
    table.caption = _more(len(network.kept), most)
    return [Line(f"{title}energy off the centre that is kept of the convs that were replaced"), table]


def _spectra(network: NetworkKernels, title: str, most: int | None) -> list[RenderableType]:
    if not network.spectra:
        return []
    columns = [Column("block", ""), Column("size", ""), *_numbers("sends", "makes", "lost", "lost of all")]
    table = Sheet([*columns, Column("power by frequency", "power by frequency ")])
    for one in network.spectra[:most]:
        counts = (str(one.channels), str(one.low))
        row = (one.path, words.size(one.size), *counts, f"{one.share:.1%}", f"{one.share_of_all:.1%}")
        table.add_row(*row, _sparks(one.power))
    table.caption = _more(len(network.spectra), most)
    numbers = f"random numbers, {network.input}: give --input photo.jpg" if network.is_drawn else network.input
    says = (
        f"what octave convs send to their low streams (on {numbers}). lost: energy above half of the highest "
        "frequency, which half the resolution cannot hold, of what varies over the map; of all: with each channel's "
        "average"
    )
    return [Line(f"{title}{says}"), table]


def _left_out(network: NetworkKernels, title: str) -> Iterator[RenderableType]:
    """Say what is in no matrix: each reason once."""
    reasons: dict[str, list[str]] = {}
    for path, why in network.left_out:
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        yield Listing(f"{title}in no matrix: {why}", paths, words.MOST_ROWS)


def _numbers(*titles: str) -> list[Column]:
    return [Column(title, f"{title} ", is_number=True) for title in titles]


def _more(count: int, most: int | None) -> str:
    return f"{count - most} more with --layers, and in --json" if most is not None and count > most else ""


def _sparks(power: Sequence[float]) -> str:
    """Draw numbers as bars.

    >>> _sparks((0.0, 0.5, 1.0))
    '▁▅█'
    """
    most = max(power, default=0.0) or 1.0
    return "".join(_BARS[min(round(value / most * (len(_BARS) - 1)), len(_BARS) - 1)] for value in power)
