"""Which convs write into maps that are added together, and which of these maps each conv reads.

A map of two streams has one share of low channels. Maps that are added need the same one, so the convs that write them
share it; a conv that reads such a map has nothing to choose there. Every other map may have a share of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from surgeon.analysis.sites import Survey
from surgeon.blocks import Wanted
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.conv import streams
from surgeon.octave import roles
from surgeon.octave.region import Region


@dataclass(frozen=True, slots=True)
class Maps:
    """The convs that write each kind of map (`writers`), and by path the numbers of the kinds that a conv reads."""

    writers: tuple[tuple[str, ...], ...]
    reads: Mapping[str, tuple[int, ...]]


def maps_of(survey: Survey, wanted: Mapping[str, Wanted[TwoStreamOptions]]) -> Maps:
    """Follow the low channels of all wanted convs through a network, as they would be planned together.

    A conv that splits and joins by itself, for whatever reason, has a kind of map to itself.
    """
    ties: dict[str, str] = {}
    reads: dict[str, set[str]] = {}
    for region in roles.regions(survey, wanted):
        _follow(region, ties, reads)
    alone = [path for path in roles.assign(survey, wanted).options if path not in ties and path not in reads]
    ties |= {path: path for path in alone}
    groups: dict[str, list[str]] = {}
    for path in wanted:
        if path in ties:
            groups.setdefault(_root(ties, path), []).append(path)
    numbers = {root: i for i, root in enumerate(groups)}
    found = {path: tuple(sorted({numbers[_root(ties, one)] for one in sources})) for path, sources in reads.items()}
    return Maps(tuple(map(tuple, groups.values())), found)


def _follow(region: Region, ties: dict[str, str], reads: dict[str, set[str]]) -> None:
    """Note for each value which convs have written its low channels, and tie those of maps that are added."""
    sources: dict[fx.Node, set[str]] = {}
    for node, layout in region.layouts.items():
        operands: Sequence[fx.Node] = node.all_input_nodes
        came = set().union(*(sources.get(one, set()) for one in operands))
        if (path := region.paths.get(node)) is not None:
            if came:
                reads.setdefault(path, set()).update(came)
            sources[node] = {path} if layout.low else set()
            ties.update({one: ties.get(one, one) for one in sources[node]})
            continue
        sources[node] = came if layout.low else set()
        counts = [streams.count(region.layouts[one].low) for one in operands if sources.get(one)]
        if layout.low and len(counts) > 1 and streams.count(layout.low) != sum(counts):
            _tie(ties, came)


def _tie(ties: dict[str, str], paths: set[str]) -> None:
    roots = sorted({_root(ties, path) for path in paths})
    ties.update(dict.fromkeys(roots, roots[0]))


def _root(ties: Mapping[str, str], path: str) -> str:
    while ties[path] != path:
        path = ties[path]
    return path
