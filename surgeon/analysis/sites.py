"""Network → sites: every conv of a model with its names, geometry, shapes, calls and readers.

A site also says what stands in the way: `obstacle` is why the conv cannot be swapped at all, `norm_obstacle` why a
block cannot take over the norm behind it. Both are sentences that end up in the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import RenderableType
from torch import nn

from surgeon.analysis.fingerprint import fingerprint
from surgeon.analysis.functional import Functional, conv_of, find
from surgeon.analysis.islands import Opaque
from surgeon.analysis.network import Network
from surgeon.analysis.obstacles import custom_call, norm_behind, obstacle
from surgeon.analysis.readers import Facts, reader_name
from surgeon.analysis.run import Call
from surgeon.analysis.self_folding import SelfFolding, SelfFoldings
from surgeon.blocks import Block
from surgeon.conv.spec import ConvSpec
from surgeon.display.shown import Shown
from surgeon.display.survey import survey_view
from surgeon.models.call import Inputs
from surgeon.models.cost import Cost, measure


@dataclass(frozen=True, slots=True)
class Site:
    """One conv of a model; `paths` are all its names, the first is the one that plans and reports use."""

    paths: tuple[str, ...]
    kind: str  # the class
    spec: ConvSpec | None  # None where it is not a Conv2d
    calls: int | None  # per run of the model; None where neither a graph nor a run tells
    readers: tuple[str, ...]  # classes and functions that read its output
    obstacle: str | None
    norm: tuple[str, ...]  # all names of the norm that a block can take over
    norm_obstacle: str | None
    runs: tuple[Call, ...]  # shapes, call by call, where an input is known
    dtype: torch.dtype
    cost: Cost  # of the conv alone, all calls of a run
    norm_cost: Cost  # of the norm that can be taken over
    functional: Functional | None = None  # where it is a call of F.conv2d, and no module yet
    folds_itself: SelfFolding | None = None  # a module around it whose class folds its convs and norms

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input, of the first call."""
        return (self.runs[0].shape_in[-2], self.runs[0].shape_in[-1]) if self.runs else None


@dataclass(frozen=True, slots=True)
class Survey(Shown):
    """All sites of a model in the order of its modules, and what was known when they were looked at."""

    network: Network  # what was looked at
    fingerprint: str
    sites: tuple[Site, ...]
    blocks: dict[str, int]  # blocks that are in the model already
    weights: dict[str, torch.Tensor]  # the model's own, by the first name of their conv

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def inputs(self) -> Inputs | None:
        return self.network.inputs

    @property
    def cost(self) -> Cost:
        return self.network.cost

    @property
    def opaque(self) -> Sequence[Opaque]:
        """Modules whose own Python could not be followed."""
        return self.network.captured.opaque

    def __rich__(self) -> RenderableType:
        return survey_view(self)


def survey(network: Network) -> Survey:
    """Look at every conv of a network; where no input is known there are no shapes and no multiply-adds.

    >>> [str(site.spec) for site in survey(Network(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))).sites]
    ['3→8, 3x3']

    Raises:
        CaptureError: the model does not accept its input.
    """
    model, facts = network.model, Facts(network)
    costs, called = _Costs(facts), network.run.functional
    functional = [one for island in network.islands for one in find(model, island, custom_call)]
    known = {_joined(one.island, one.weight) for one in functional}
    sites = (
        *(_site(facts, costs, module) for module in facts.convs()),
        *(_functional_site(facts, costs, one, called) for one in functional),
        *(_unseen_site(name, calls) for name, calls in called.items() if facts.is_unseen(name, known)),
    )
    foldings = SelfFoldings(model)
    sites = tuple(replace(site, folds_itself=foldings.around(site.paths)) for site in sites)
    blocks = Counter(m.name for m in model.modules() if isinstance(m, Block))
    weights = {facts.names[m][0]: m.weight for m in facts.convs() if isinstance(m, nn.Conv2d)}
    weights |= {one.path: conv_of(model, one).weight for one in functional if one.spec is not None}
    return Survey(network, fingerprint(model), sites, dict(blocks), weights)


def _site(facts: Facts, costs: _Costs, module: nn.Module) -> Site:
    runs = facts.runs.get(facts.names[module][0], [])
    graph = facts.graph_of.get(module)
    nodes = graph.calls[module] if graph else []
    stays = obstacle(facts, module)
    norm, norm_obstacle = norm_behind(facts, module)
    if norm is not None and (count := facts.calls_of(norm)) != len(runs):
        norm, norm_obstacle = None, f"a run calls it {len(runs)} times, and its norm {count} times"
    return Site(
        paths=facts.names[module],
        kind=type(module).__name__,
        spec=_spec(facts, module, stays),
        calls=len(runs) if runs else (len(nodes) or None),
        readers=tuple(reader_name(graph, user) for node in nodes for user in node.users) if graph else (),
        obstacle=stays,
        norm=facts.names[norm] if norm is not None else (),
        norm_obstacle=norm_obstacle,
        runs=tuple(runs),
        dtype=next((p.dtype for p in module.parameters()), torch.get_default_dtype()),
        cost=costs.of(module),
        norm_cost=Cost(0, 0, 0, 0) if norm is None else costs.of(norm),
    )


def _spec(facts: Facts, module: nn.Module, stays: str | None) -> ConvSpec | None:
    """Describe a conv: by what it computes, where that is known, else by its attributes."""
    if not isinstance(module, nn.Conv2d):
        return None
    found = facts.computes(module) if stays is None else None
    return found if isinstance(found, ConvSpec) else ConvSpec.of(module)


def _functional_site(facts: Facts, costs: _Costs, one: Functional, called: Mapping[str, list[Call]]) -> Site:
    """Describe a functional convolution as the conv that it can become."""
    graph = facts.islands[one.island]
    node = next(node for node in graph.nodes if node.name == one.step)
    if one.spec is None:
        readers = tuple(reader_name(graph, user) for user in node.users)
        return replace(_unseen_site(one.path, ()), readers=readers, obstacle=one.obstacle, functional=one, calls=1)
    conv = conv_of(facts.model, one)
    facts.names[conv], facts.graph_of[conv], graph.calls[conv] = (one.path,), graph, [node]
    facts.runs[one.path] = called.get(_joined(one.island, one.weight), [])
    for parameter in conv.parameters():
        facts.owners[id(parameter)] = {conv}
    site = _site(facts, costs, conv)
    return replace(site, kind="conv2d", obstacle=one.obstacle or site.obstacle, functional=one)


def _unseen_site(name: str, calls: Sequence[Call]) -> Site:
    """Describe a functional convolution that is in no graph."""
    return Site(
        paths=(name,),
        kind="conv2d",
        spec=None,
        calls=len(calls) or None,
        readers=(),
        obstacle="a functional convolution in Python that could not be traced",
        norm=(),
        norm_obstacle=None,
        runs=tuple(calls),
        dtype=torch.get_default_dtype(),
        cost=Cost(0, 0, 0, 0) if calls else Cost(0, 0),
        norm_cost=Cost(0, 0, 0, 0),
    )


def _joined(*path: str) -> str:
    return ".".join(part for part in path if part)


class _Costs:
    """Costs of convs and norms over all their calls."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.known: dict[object, Cost] = {}

    def of(self, module: nn.Module) -> Cost:
        """Measure a conv or norm over all its calls; equal ones, of which a network has many, are measured once."""
        runs = self.facts.runs.get(self.facts.names[module][0], [])
        if type(module) not in (nn.Conv2d, nn.BatchNorm2d) or custom_call(module, "it"):
            return measure_calls(module, runs)
        key = (repr(module), tuple(t.dtype for t in module.parameters()), *(run.shape_in for run in runs))
        if key not in self.known:
            self.known[key] = measure_calls(module, runs)
        return self.known[key]


def measure_calls(module: nn.Module, calls: Sequence[Call]) -> Cost:
    """Measure a module over all calls of a run."""
    stored = measure(module)
    if not calls:
        return stored
    shapes = Counter(call.shape_in for call in calls)
    runs = [_measured(module, shape).times(count) for shape, count in shapes.items()]
    return replace(
        stored,
        macs=sum(run.macs for run in runs if run.macs is not None),
        activations=sum(run.activations for run in runs if run.activations is not None),
    )


def _measured(module: nn.Module, shape: tuple[int, ...]) -> Cost:
    """Measure one call without numbers, or with zeros where the module asks for the values of its input."""
    held = next(module.parameters(), None)
    dtype, device = (None, None) if held is None else (held.dtype, held.device)
    try:
        return measure(module, [torch.empty(shape, device="meta", dtype=dtype)])
    except Exception:
        return measure(module, [torch.zeros(shape, device=device, dtype=dtype)])
