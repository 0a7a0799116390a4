"""Where in their kernels the networks have their large weights, and what each branch and stream is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from surgeon.figures.gammas import LayerScales
from surgeon.figures.kept import KeptEnergy
from surgeon.figures.kernels import NetworkKernels
from surgeon.figures.magnitudes import LayerMagnitude, Matrix
from surgeon.figures.spectra import HELD, Spectrum
from surgeon.page import charts
from surgeon.page.base import Section
from surgeon.page.charts import Axis
from surgeon.page.data import PageData
from surgeon.page.markup import element, filled, joined

_TALL, _SMALL = 180, 72  # pixels of the drawing of all scales, and of one spectrum
_MARKS = (("square", "before"), ("circle", "after"), ("diamond", "low"), ("ring", "good"), ("circle", "warn"))
_WIDEST = 110  # pixels of the matrix of one layer
_FEW = 6  # layers that are shown without a click


class Kernels(Section):
    """Average kernel magnitudes of networks and layers, scales of branches, kept energy, spectra of octave convs."""

    title = "Kernels"
    anchor = "kernels"
    place = 70

    def applies(self, data: PageData) -> bool:
        return data.kernels is not None

    def body(self, data: PageData) -> Markup:
        assert data.kernels is not None
        networks = [_Shown(one) for one in data.kernels.networks]
        return filled("kernels.html", networks=networks, averages=list(_averages(data.kernels.networks)), few=_FEW)


class _Shown:
    """What the template shows of one network."""

    def __init__(self, network: NetworkKernels) -> None:
        self.name = f"{network.label} {network.name}"
        self.layers = [(one, list(_maps(one)), _rows(one.matrix)) for one in network.layers]
        self.has_branches = any(one.branches for one in network.layers)
        self.scales = network.scales
        names = list(dict.fromkeys(branch.name for one in network.scales for branch in one.branches))
        self.scales_key = charts.key(*[(*_MARKS[i % len(_MARKS)], name) for i, name in enumerate(names)])
        self.scales_drawn = _scales(network.scales, names) if network.scales else None
        self.kept = [(one, _share(one)) for one in network.kept]
        powers = Axis.of_powers(power for one in network.spectra for power in one.power)
        self.spectra = [(one, _spectrum(one, powers)) for one in network.spectra]
        self.left_out = network.left_out


def _averages(networks: Sequence[NetworkKernels]) -> Iterator[tuple[str, list[tuple[str, Markup, Matrix]]]]:
    """Give, for every shape of kernels, the matrices of all networks side by side, each beside its control."""
    shapes = dict.fromkeys(one.shape for network in networks for one in network.averages)
    for shape in shapes:
        maps: list[tuple[str, Markup, Matrix]] = []
        for network in networks:
            for one in network.averages:
                if one.shape == shape:
                    count = f"{one.layers} layer{'s' * (one.layers > 1)}"
                    maps.append(_map(f"{network.label} {network.name}, {count}", one.matrix))
                    if one.untrained is not None:
                        maps.append(
                            _map(f"{network.label} untrained: weights as they are drawn at first", one.untrained)
                        )
        yield f"{shape[0]}×{shape[1]}", maps


def _map(title: str, matrix: Matrix) -> tuple[str, Markup, Matrix]:
    return title, charts.heat_map(title, matrix, cell=44 if len(matrix) <= 5 else 32), matrix


def _maps(layer: LayerMagnitude) -> Iterator[tuple[str, Markup]]:
    """Draw the branches of a layer, as large as they are beside the whole, then the whole and the control."""
    cell = max(8, min(22, _WIDEST // max(layer.shape)))
    for branch in layer.branches:
        scaled = tuple(tuple(number * min(1.0, branch.share) for number in row) for row in branch.matrix)
        yield branch.name, charts.heat_map(f"{layer.path}: {branch.name}", scaled, cell=cell)
    whole = "folded" if layer.branches else "kernel"
    yield whole, charts.heat_map(f"{layer.path}: {whole}", layer.matrix, cell=cell)
    if layer.untrained is not None:
        yield "untrained", charts.heat_map(f"{layer.path}: untrained", layer.untrained, cell=cell)


def _rows(matrix: Matrix) -> str:
    """Write a matrix as text, row by row."""
    return " / ".join(" ".join(f"{number:.2f}" for number in row) for row in matrix)


def _scales(layers: Sequence[LayerScales], names: Sequence[str]) -> Markup:
    """Draw |γ| of every branch by layer: the mean, and a line from the lower to the upper quartile."""
    axis = Axis.from_zero(branch.gamma.upper for one in layers for branch in one.branches)
    axis = Axis.from_zero([axis.most, *(branch.gamma.mean for one in layers for branch in one.branches)])
    parts = [charts.upwards(axis, _TALL)]
    for i, layer in enumerate(layers):
        for branch in layer.branches:
            place = names.index(branch.name)
            x = (i + (place + 1) / (len(names) + 1)) / len(layers)
            mark, colour = _MARKS[place % len(_MARKS)]
            low, high = (_TALL * (1 - axis.at(one)) for one in (branch.gamma.lower, branch.gamma.upper))
            at = charts.percent(x)
            parts.append(element("line", class_=f"ch-spread stroke-{colour}", x1=at, x2=at, y1=low, y2=high))
            said = f"{layer.path}, {branch.name}: |γ| {branch.gamma.mean:.3g}"
            y = _TALL * (1 - axis.at(branch.gamma.mean))
            parts.append(charts.dot(x, y, colour, said, mark=mark, size=3.5))
    says = f"{len(layers)} blocks from left to right in the order of the modules; the table below has the numbers."
    return charts.drawing("Scale |γ| of each branch by layer", says, _TALL + 8, *parts, sides="ch-left")


def _share(one: KeptEnergy) -> Markup:
    """Draw the share that a block keeps as a bar."""
    parts = [element("rect", x=0, y=2, width="100%", height=10, class_="fill-sunk")]
    parts.append(charts.bar(0, one.share, 2, 10, "after"))
    return element("svg", *parts, width="100%", height=14, aria_hidden="true", class_="ch-share")


def _spectrum(one: Spectrum, axis: Axis) -> Markup:
    """Draw the power of each frequency; what the low stream cannot hold is on the right of the line."""
    most = max(one.frequencies, default=1.0)
    points = [(at / most, axis.at(power)) for at, power in zip(one.frequencies, one.power, strict=True)]
    held = charts.percent(HELD / most)
    parts = [element("rect", x=held, y=0, width=charts.percent(1 - HELD / most), height=_SMALL, class_="fill-sunk")]
    parts += [element("line", class_="axis", x1=0, x2="100%", y1=y, y2=y) for y in (0, _SMALL)]
    parts.append(charts.curve(points, _SMALL, "after"))
    parts.append(element("line", class_="rule", x1=held, x2=held, y1=0, y2=_SMALL))
    says = f"Power from low to high frequencies on a log scale; {one.share:.1%} of it lies beyond what half the "
    says += "resolution holds."
    return charts.drawing(f"Spectrum of {one.path}", joined([says]), _SMALL, *parts)
