"""nn.Module → sites: every conv of a model with its names, geometry, shapes, calls and readers.

A site also says what stands in the way: `obstacle` is why the conv cannot be swapped at all, `norm_obstacle` why a
block cannot take over the norm behind it. Both are sentences that end up in the plan.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from surgeon._torch_compat import NormBase, has_own_conv_forward
from surgeon.analysis import islands as capturing
from surgeon.analysis.functional import Functional, conv_of, find
from surgeon.analysis.islands import Call, Capture, Observed
from surgeon.blocks import Block
from surgeon.blocks.pairs import PairNorm
from surgeon.conv.spec import ConvSpec
from surgeon.models import copies as copying
from surgeon.models.call import Inputs
from surgeon.models.cost import Cost, measure

NO_NORM = "no norm follows"
_COMPUTES = {
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
    BasePruningMethod: "prune.remove",
}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, PairNorm)  # what a block can take over: the plain ones, not subclasses


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

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input, of the first call."""
        return (self.runs[0].shape_in[-2], self.runs[0].shape_in[-1]) if self.runs else None


@dataclass(frozen=True, slots=True)
class Survey:
    """All sites of a model in the order of its modules, and what was known when they were looked at."""

    fingerprint: str
    sites: tuple[Site, ...]
    blocks: dict[str, int]  # blocks that are in the model already
    capture: Capture
    inputs: Inputs | None
    cost: Cost
    weights: dict[str, torch.Tensor]  # the model's own, by the first name of their conv
    model: nn.Module  # what was looked at


def survey(model: nn.Module, inputs: Inputs | None = None, *, called_with: Inputs | None = None) -> Survey:
    """Look at every conv of a model; without inputs there are no shapes and no multiply-adds.

    `called_with` says how it is called where it is not to be run.

    >>> [str(site.spec) for site in survey(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).sites]
    ['3→8, 3x3']

    Raises:
        CaptureError: the model does not accept the inputs.
    """
    observed = capturing.observe(model, inputs) if inputs else None
    captured = capturing.capture(model, inputs or called_with, observed)
    observed = observed or Observed()
    facts = _Facts(model, captured, observed)
    functional = [one for island in captured.islands for one in find(model, island, custom_call)]
    known = {_joined(one.island, one.weight) for one in functional}
    sites = (
        *(_site(facts, module) for module in facts.convs()),
        *(_functional_site(facts, one, observed) for one in functional),
        *(_unseen_site(name, calls) for name, calls in observed.functional.items() if facts.is_unseen(name, known)),
    )
    blocks = Counter(m.name for m in model.modules() if isinstance(m, Block))
    cost = measure(model, inputs)
    weights = {facts.names[m][0]: m.weight for m in facts.convs() if type(m) is nn.Conv2d}
    weights |= {one.path: conv_of(model, one).weight for one in functional if one.spec is not None}
    return Survey(fingerprint(model), sites, dict(blocks), captured, inputs, cost, weights, model)


def norms_behind(model: nn.Module, inputs: Inputs | None = None) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Give all names of every conv or block that has a norm of its own behind it, and all names of that norm."""
    facts = _Facts(model, capturing.capture(model, inputs), Observed())
    found = []
    for module in [*facts.convs(), *(m for m in facts.names if isinstance(m, Block))]:
        norm, _ = _norm_behind(facts, module)
        if norm is not None and not (isinstance(module, nn.Conv2d) and _obstacle(facts, module)):
            found.append((facts.names[module], facts.names[norm]))
    return found


def fingerprint(model: nn.Module) -> str:
    """Hash the architecture: names and classes of modules, geometry of convs, names and shapes of stored tensors."""
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        geometry = str(ConvSpec.of(module)) if type(module) is nn.Conv2d else ""
        lines.append(f"{name} {type(module).__qualname__} {geometry}")
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    lines += [f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(slots=True)
class _Graph:
    """The calls of an island by module, and the names it is known under."""

    nodes: list[fx.Node]
    calls: dict[nn.Module, list[fx.Node]]
    modules: dict[str, nn.Module]
    names: tuple[str, ...]


class _Facts:
    """What graphs and names tell about the modules of one model."""

    def __init__(self, model: nn.Module, captured: Capture, observed: Observed) -> None:
        self.model = model
        self.runs = observed.calls
        self.names = copying.names(model)
        self.owners = _owners(model)
        self.graph_of: dict[nn.Module, _Graph] = {}
        self.traced: set[nn.Module] = set()
        self.read_directly = {model.get_submodule(name) for name in observed.read_directly}
        self.kept_aside = copying.kept_aside(model)
        self.islands = {island.path: self._read(island) for island in captured.islands}
        self.costs: dict[object, Cost] = {}

    def convs(self) -> Iterator[nn.Module]:
        """Give every conv outside surgeon's blocks."""
        inside = {m for block in self.names if isinstance(block, Block) for m in block.modules()}
        convs = (module for module in self.names if capturing.is_conv(module) or _is_quantised(module))
        return (module for module in convs if module not in inside)

    def is_unseen(self, parameter: str, known: set[str]) -> bool:
        """Whether a parameter that a run has convolved with is that of no conv, and in no graph."""
        return parameter not in known and not capturing.is_conv(self.model.get_submodule(parameter.rpartition(".")[0]))

    def calls_of(self, module: nn.Module) -> int:
        """How often a run has called a module; 0 where there was none."""
        return len(self.runs.get(self.names[module][0], []))

    def cost(self, module: nn.Module) -> Cost:
        """Measure a conv or norm over all its calls; alike ones, which a network is full of, are measured once."""
        runs = self.runs.get(self.names[module][0], [])
        if type(module) not in (nn.Conv2d, nn.BatchNorm2d) or custom_call(module, "it"):
            return measure_calls(module, runs)
        key = (repr(module), tuple(t.dtype for t in module.parameters()), *(run.shape_in for run in runs))
        if key not in self.costs:
            self.costs[key] = measure_calls(module, runs)
        return self.costs[key]

    def _read(self, island: capturing.Island) -> _Graph:
        root = self.model.get_submodule(island.path)
        modules = dict(root.named_modules(remove_duplicate=False))
        self.traced.update(modules.values())
        graph = _Graph(list(island.graph.nodes), {}, modules, self.names[root])
        for node in island.graph.nodes:
            if node.op == "call_module":
                module = modules[node.target]
                graph.calls.setdefault(module, []).append(node)
                self.graph_of[module] = graph
            elif node.op == "get_attr" and (holder := modules.get(node.target.rpartition(".")[0])) is not None:
                self.read_directly.add(holder)
        return graph


def _site(facts: _Facts, module: nn.Module) -> Site:
    runs = facts.runs.get(facts.names[module][0], [])
    graph = facts.graph_of.get(module)
    nodes = graph.calls[module] if graph else []
    norm, norm_obstacle = _norm_behind(facts, module)
    if norm is not None and (count := facts.calls_of(norm)) != len(runs):
        norm, norm_obstacle = None, f"a run calls it {len(runs)} times, and its norm {count} times"
    spec = ConvSpec.of(module) if isinstance(module, nn.Conv2d) else None
    return Site(
        paths=facts.names[module],
        kind=type(module).__name__,
        spec=spec,
        calls=len(runs) if runs else (len(nodes) or None),
        readers=tuple(_reader(graph, user) for node in nodes for user in node.users) if graph else (),
        obstacle=_obstacle(facts, module),
        norm=facts.names[norm] if norm is not None else (),
        norm_obstacle=norm_obstacle,
        runs=tuple(runs),
        dtype=next((p.dtype for p in module.parameters()), torch.get_default_dtype()),
        cost=facts.cost(module),
        norm_cost=Cost(0, 0, 0, 0) if norm is None else facts.cost(norm),
    )


def _functional_site(facts: _Facts, one: Functional, observed: Observed) -> Site:
    """Describe a functional convolution as the conv that it can become."""
    graph = facts.islands[one.island]
    node = next(node for node in graph.nodes if node.name == one.step)
    if one.spec is None:
        readers = tuple(_reader(graph, user) for user in node.users)
        return replace(_unseen_site(one.path, ()), readers=readers, obstacle=one.obstacle, functional=one, calls=1)
    conv = conv_of(facts.model, one)
    facts.names[conv], facts.graph_of[conv], graph.calls[conv] = (one.path,), graph, [node]
    facts.runs[one.path] = observed.functional.get(_joined(one.island, one.weight), [])
    for parameter in conv.parameters():
        facts.owners[id(parameter)] = {conv}
    site = _site(facts, conv)
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


def measure_calls(module: nn.Module, calls: Sequence[Call]) -> Cost:
    """Measure a module over all calls of a run."""
    stored = measure(module)
    if not calls:
        return stored
    shapes = Counter(call.shape_in for call in calls)
    dtype = next((p.dtype for p in module.parameters()), None)
    runs = [
        measure(module, [torch.empty(shape, device="meta", dtype=dtype)]).times(count)
        for shape, count in shapes.items()
    ]
    return replace(
        stored,
        macs=sum(run.macs for run in runs if run.macs is not None),
        activations=sum(run.activations for run in runs if run.activations is not None),
    )


def _obstacle(facts: _Facts, module: nn.Module) -> str | None:
    """Say why a conv cannot be swapped by any block."""
    if _is_quantised(module):
        return "its weight is quantised; swap convs before a network is quantised"
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__}: only Conv2d is swapped"
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization; torch.nn.utils.parametrize can remove that"
    if type(module) is not nn.Conv2d:
        named = type(module).__qualname__
        kind = f"{type(module).__module__}.{named}" if named == nn.Conv2d.__qualname__ else named
        own = "with a forward of its own" if _computes_itself(type(module)) else "of its own kind"
        return f"{kind} is a Conv2d {own}; only torch's own is swapped"
    if computed := _computed(module):
        return computed
    if custom := custom_call(module, "it"):
        return f"{custom}, which a block would not have"
    if facts.names[module][0] == "":
        return "it is the whole model: there is no module that holds it; nn.Sequential(model) is one"
    for parameter in module.parameters():
        if others := facts.owners[id(parameter)] - {module}:
            return f"its weights are also those of {facts.names[others.pop()][0]}"
    if module in facts.read_directly:
        return "the network also reads its weight directly"
    if module in facts.kept_aside:
        return f"it is also kept in {facts.kept_aside[module]}, where a swap would not reach it"
    if module not in facts.graph_of and module in facts.traced:
        return "it is never called"
    if not module.weight.numel():
        return "it has no channels"
    if module.weight.is_complex():
        return "its weight is complex"
    if any(len(call.shape_in) == 3 for call in facts.runs.get(facts.names[module][0], [])):
        return "it is called with one map alone, without the dimension of a batch"
    return None


def _computed(conv: nn.Conv2d) -> str | None:
    """Say which hook computes a weight or a bias before each call, as pruning and the older weight norms do."""
    for hook in conv._forward_pre_hooks.values():
        for kind, undo in _COMPUTES.items():
            if isinstance(hook, kind):
                return f"a hook ({type(hook).__name__}) computes its tensors; torch.nn.utils.{undo} makes them stay"
    return None


def _is_quantised(module: nn.Module) -> bool:
    """Whether it is one of torch's convs in whole numbers, which share no class with the others."""
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quantized") and "Conv" in kind.__name__


def _norm_behind(facts: _Facts, conv: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Find the norm that belongs to this conv alone, or say why there is none."""
    graph = facts.graph_of.get(conv)
    if graph is None:
        return None, "it is never called" if conv in facts.traced else "what follows it could not be traced"
    nodes = graph.calls[conv]
    if len(nodes) != 1:
        return None, f"it is called {len(nodes)} times"
    users = _users(nodes[0])
    readers = [_reader(graph, user) for user in users]
    norm = graph.modules[str(users[0].target)] if users and users[0].op == "call_module" else None
    if len(users) != 1:
        return None, f"its output is read by {' and '.join(readers)}" if users else "nothing reads its output"
    if norm is None or not _is_norm(norm):
        return None, NO_NORM
    return _judge_norm(facts, graph, conv, norm)


def _users(node: fx.Node) -> list[fx.Node]:
    """Give what reads a conv or block; whoever reads the streams of a pair reads the block."""
    users = list(node.users)
    if users and all(user.target is operator.getitem for user in users):
        return list(dict.fromkeys(reader for user in users for reader in user.users))
    return users


def _judge_norm(facts: _Facts, graph: _Graph, conv: nn.Module, norm: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Check all that taking over a norm assumes of it."""
    name = facts.names[norm][0]
    prefixes = tuple(f"{path}." if path else "" for path in graph.names)
    outside = [path for path in (*facts.names[conv], *facts.names[norm]) if not path.startswith(prefixes)]
    if not isinstance(norm, _NORMS) or type(norm) not in _NORMS:
        return None, f"{name} is a {type(norm).__name__}; only torch's own BatchNorm2d can be taken over"
    if (count := len(graph.calls[norm])) != 1:
        return None, f"{name} is called {count} times"
    if norm.running_mean is None or norm.running_var is None:
        return None, f"{name} keeps no running statistics"
    if outside:
        return None, f"it is also reached as {outside[0]}"
    if custom := custom_call(norm, name):
        return None, custom
    if any(facts.owners[id(p)] != {norm} for p in norm.parameters()):
        return None, f"{name} shares its parameters"
    if norm in facts.read_directly:
        return None, f"the network also reads the parameters of {name} directly"
    if norm in facts.kept_aside:
        return None, f"{name} is also kept in {facts.kept_aside[norm]}"
    return norm, None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NormBase | nn.GroupNorm | nn.LayerNorm) or "norm" in type(module).__name__.lower()


def custom_call(module: nn.Module, name: str) -> str | None:
    """Say what else a module, called `name`, does when it is called than its class does."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return f"hooks are attached to {name}"
    return f"{name} has a forward of its own" if "forward" in vars(module) else None


def _computes_itself(kind: type[nn.Conv2d]) -> bool:
    """Whether a class does more than Conv2d does when it is called: pads by itself, say, or scales its weight."""
    return kind.forward is not nn.Conv2d.forward or has_own_conv_forward(kind)


def _owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """Give the modules that hold each parameter, by its id."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return owners


def _reader(graph: _Graph, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.modules[str(node.target)]).__name__
    if node.op == "output":
        return "output"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
