"""Linear sub-graphs: all that lies between one map and a later one, if it is one affine convolution.

From a step backwards, a sub-graph takes in what its steps read, the last one first, as long as that is linear and read
by nothing outside. Whenever all that it reads is one map, it is complete; the one that reaches furthest back and is one
convolution is folded. In-place steps make a step read something else than its name says, so they are followed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from surgeon.analysis import places
from surgeon.analysis.in_place import base_of, reads_later, written_by
from surgeon.analysis.linear_steps import Step, Steps, channels_of
from surgeon.conv.affine import Affine
from surgeon.conv.axis import NotOneConvError

VIEWS = ("same", "take", "list", "unlist")
_TIMES = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class SubGraph:
    """A linear sub-graph: the map that it reads, its steps in order, and the convolution that it is.

    Of a last step that is a norm with an activation behind it, only the norm belongs to it: it `leaves` the rest.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    steps: Mapping[fx.Node, Step]
    affine: Affine

    @property
    def sink(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def leaves(self) -> bool:
        return self.steps[self.sink].leaves

    @property
    def space(self) -> str:
        """Whether it works on maps or on vectors."""
        return "vector" if all(self.steps[node].space != "map" for node in self.convs) else "map"

    @property
    def convs(self) -> list[fx.Node]:
        return [node for node in self.nodes if self.steps[node].kind == "conv"]

    @property
    def has_branches(self) -> bool:
        """Whether it is more than one conv with what belongs to it: a sum, channels side by side, or several convs."""
        return len(self.convs) > 1 or any(self.steps[node].kind in ("sum", "cat") for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Refused:
    """A sub-graph that is not folded, by the step at its end, and why."""

    sink: fx.Node
    why: str


Wanted = Callable[[SubGraph], bool]


def find(steps: Steps, graph: fx.Graph, wanted: Wanted, *, costlier: bool = False) -> list[SubGraph | Refused]:
    """Find the largest sub-graphs that are one conv each, the last of the graph first.

    `wanted` chooses among those that are; `costlier` ones, which take more multiply-adds as one conv, are left out
    unless they are asked for.
    """
    taken: set[fx.Node] = set()
    found: list[SubGraph | Refused] = []
    for sink in reversed(list(graph.nodes)):
        step = steps.step(sink)
        if sink in taken or step is None or step.kind in ("same", "take", "list"):
            continue
        reasons: list[str] = []
        for source, inside in reversed(list(_reaches(steps, sink))):
            if taken & inside.keys():
                continue
            made = _folded(steps, source, inside, costlier=costlier)
            if isinstance(made, SubGraph) and wanted(made):
                found.append(made)
                taken |= inside.keys()
                break
            if isinstance(made, str):
                reasons.append(made)
        else:
            if reasons and step.kind == "sum":
                found.append(Refused(sink, reasons[-1]))
    return found


def _reaches(steps: Steps, sink: fx.Node) -> Iterator[tuple[fx.Node, dict[fx.Node, Step]]]:
    """Give every map that a step is a linear sub-graph of, with the steps in between, the nearest first."""
    inside: dict[fx.Node, Step] = {}
    reads, latest = {sink}, sink
    while True:
        step = steps.step(latest)
        is_read = latest is not sink and any(user not in inside for user in latest.users)
        if step is None or is_read or (step.leaves and latest is not sink):
            return
        inside[latest] = step
        reads = (reads - {latest}) | {*step.operands}
        latest = max(reads, key=steps.order.__getitem__)
        if len(reads) == 1:
            yield latest, dict(inside)


def _folded(steps: Steps, source: fx.Node, inside: Mapping[fx.Node, Step], *, costlier: bool) -> SubGraph | str | None:
    """Make a sub-graph one conv; or say why it is none, where it looks as if it could be."""
    kinds = [step.kind for step in inside.values()]
    channels = channels_of(source, inside)
    if "conv" not in kinds or (all(kind in ("conv", *VIEWS) for kind in kinds) and kinds.count("conv") < 2):
        return None
    if channels is None:
        return "it is not known how many channels it reads"
    nodes = tuple(sorted(inside, key=steps.order.__getitem__))
    if not _is_of_one_space(source, nodes, inside):
        return None
    if why := _changed_in_place(steps, source, nodes):
        return why
    values = {source: Affine.identity(channels)}
    try:
        for node in nodes:
            values[node] = inside[node].apply(*(values[one] for one in inside[node].operands))
        whole = values[nodes[-1]].uncropped()
        spec = whole.spec()
    except NotOneConvError as error:
        return str(error)
    if spec.pads_input is not None:
        return "no conv of torch pads its sides unequally"
    if whole.kernel.numel() > whole.macs * _TIMES and not costlier:
        return f"as one conv it would take {whole.kernel.numel() / whole.macs:.2f} times the multiply-adds"
    return SubGraph(source, nodes, inside, whole)


def _is_of_one_space(source: fx.Node, nodes: Sequence[fx.Node], inside: Mapping[fx.Node, Step]) -> bool:
    """Whether all steps work on maps, or all on vectors, of which a list is made again what it was."""
    convs = {inside[node].space for node in nodes if inside[node].kind == "conv"}
    if len(convs) != 1:
        return False
    start = convs.pop()
    spaces = {source: start}
    for node in nodes:
        step = inside[node]
        read = {spaces[one] for one in step.operands}
        if len(read) != 1:
            return False
        space = read.pop()
        if step.kind == "list":
            if space != "vector":
                return False
            space = "list"
        elif step.kind == "unlist":
            if space != "list" or spaces.get(_reference(node)) != "vector":
                return False
            space = "vector"
        elif step.space and step.space != ("vector" if space == "list" and step.kind == "norm" else space):
            return False
        spaces[node] = space
    return spaces[nodes[-1]] == start


def _reference(node: fx.Node) -> fx.Node:
    """Give the step whose shape `reshape_as` takes."""
    reference = node.args[1]
    assert isinstance(reference, fx.Node)
    return reference


def _changed_in_place(steps: Steps, source: fx.Node, nodes: tuple[fx.Node, ...]) -> str | None:
    """Say which step changes what another one reads, so that names do not tell what is read."""
    bases = {node: base_of(node, steps.modules) for node in (source, *nodes)}
    first, last = steps.order[nodes[0]], steps.order[nodes[-1]]
    for node in steps.order:
        target = written_by(node, steps.modules)
        if target is None or node is source:  # what it has changed is what the sub-graph reads
            continue
        base = base_of(target, steps.modules)
        if base is bases[source] and (node in bases or first <= steps.order[node] <= last):
            return f"{places.said(node)} changes in place what other steps read"
        if node in bases and (later := reads_later(node, base, steps.order, steps.modules)):
            return f"{places.said(node)} changes in place what {places.said(later)} reads"
    return None
