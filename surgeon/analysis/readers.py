"""Which steps call a conv, and which read its output: what graphs and names tell about the modules of a network."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from surgeon.analysis import convs
from surgeon.analysis.islands import Island
from surgeon.analysis.network import Network
from surgeon.analysis.run import is_conv
from surgeon.blocks import Block
from surgeon.conv.spec import ConvSpec


@dataclass(slots=True)
class Graph:
    """The calls of an island by module, and the names it is known under."""

    nodes: list[fx.Node]
    calls: dict[nn.Module, list[fx.Node]]
    modules: dict[str, nn.Module]
    names: tuple[str, ...]


class Facts:
    """What graphs and names tell about the modules of one model."""

    def __init__(self, network: Network) -> None:
        self.model = model = network.model
        self.runs = network.run.calls
        self.names = dict(network.names)  # functional convs get a name here, too
        self.kept_aside = network.kept_aside
        self.owners = owners(model)
        self.graph_of: dict[nn.Module, Graph] = {}
        self._read_convs: dict[nn.Module, ConvSpec | str] = {}
        self.traced: set[nn.Module] = set()
        self.read_directly = {model.get_submodule(name) for name in network.run.read_directly}
        self.islands = {island.path: self._read(island) for island in network.islands}

    def convs(self) -> Iterator[nn.Module]:
        """Give every conv outside surgeon's blocks."""
        inside = {m for block in self.names if isinstance(block, Block) for m in block.modules()}
        convs = (module for module in self.names if is_conv(module) or is_quantised(module))
        return (module for module in convs if module not in inside)

    def computes(self, conv: nn.Conv2d) -> ConvSpec | str:
        """Say what a conv computes, or why it is none that a block can replace."""
        if conv not in self._read_convs:
            self._read_convs[conv] = convs.read(conv)
        return self._read_convs[conv]

    def is_unseen(self, parameter: str, known: set[str]) -> bool:
        """Whether a parameter that a run has used as a kernel belongs to no conv, and is in no graph."""
        return parameter not in known and not is_conv(self.model.get_submodule(parameter.rpartition(".")[0]))

    def calls_of(self, module: nn.Module) -> int:
        """How often a run has called a module; 0 where there was none."""
        return len(self.runs.get(self.names[module][0], []))

    def _read(self, island: Island) -> Graph:
        root = self.model.get_submodule(island.path)
        modules = dict(root.named_modules(remove_duplicate=False))
        self.traced.update(modules.values())
        graph = Graph(list(island.graph.nodes), {}, modules, self.names[root])
        for node in island.graph.nodes:
            if node.op == "call_module":
                module = modules[node.target]
                graph.calls.setdefault(module, []).append(node)
                self.graph_of[module] = graph
            elif node.op == "get_attr" and (holder := modules.get(node.target.rpartition(".")[0])) is not None:
                self.read_directly.add(holder)
        return graph


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Give the steps that read the output of a conv or block; one that reads a stream of a pair reads the block."""
    users = list(node.users)
    if users and all(user.target is operator.getitem for user in users):
        return list(dict.fromkeys(reader for user in users for reader in user.users))
    return users


def reader_name(graph: Graph, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.modules[str(node.target)]).__name__
    if node.op == "output":
        return "output"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """Give the modules that hold each parameter and each buffer, by its id."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(module)
    return owners


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantised convs, which share no class with the others."""
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quantized") and "Conv" in kind.__name__
