"""A network → its convs and blocks whose kernels have more than one tap, with the kernel of each in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.blocks import Block, base, contract, sum_of_convs
from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.base import Foldable, Operator
from surgeon.figures import computed
from surgeon.models.copies import duplicate
from surgeon.surgery.bake import all_baked

_OF_A_SUM = "sum of convs"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A conv or a block of a network: its first name, what it is, and the module or the weight that it has."""

    path: str
    kind: str
    geometry: str
    held: nn.Module | Tensor

    def branches(self) -> Sequence[BranchKernel]:
        """The kernels that its kernel is the sum of; none for a plain conv."""
        if isinstance(self.held, Operator):
            return contract.branch_kernels(self.held)
        return sum_of_convs.branch_kernels(self.held) if isinstance(self.held, fx.GraphModule) else ()

    def kernel(self, branches: Sequence[BranchKernel]) -> Tensor:
        """The kernel that it computes with in eval mode, (out, in/groups, kh, kw); a block folds itself, in float64."""
        if isinstance(self.held, Tensor):
            return self.held.detach().double()
        if isinstance(self.held, Foldable):
            return contract.fold(duplicate(self.held).double()).weight.detach().double()
        return torch.stack([branch.kernel for branch in branches]).sum(0)

    def untrained(self, kernel: Tensor, generator: torch.Generator) -> Tensor:
        """Give a kernel of the same shape as if it had never been trained; what is no tap of a sum stays zero."""
        if isinstance(self.held, Block):
            fresh = duplicate(self.held)
            contract.draw_anew_(fresh, generator)
            drawn = Layer(self.path, self.kind, self.geometry, fresh)
            return drawn.kernel(drawn.branches())
        return base.kaiming_uniform(tuple(kernel.shape), generator, like=kernel) * self._taps(kernel)

    def _taps(self, kernel: Tensor) -> Tensor | float:
        return kernel != 0 if isinstance(self.held, fx.GraphModule) else 1.0


@dataclass(slots=True)
class Layers:
    """The convs and blocks of a network in the order of its modules, and those without a matrix, with the reason."""

    found: list[Layer] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def layers_of(model: nn.Module) -> Layers:
    """Find all convs and blocks of a network whose kernels have more than one tap.

    Kernels that are computed at every call, as by weight norm or weight standardisation, are those of eval mode.

    >>> [layer.path for layer in layers_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))).found]
    ['0']
    """
    network, made = Network(all_baked(model)), Layers()
    place = {path: i for i, path in enumerate(dict(network.model.named_modules(remove_duplicate=False)))}
    blocks = {module: paths[0] for module, paths in network.names.items() if _is_one(module)}
    inside = {part for block in blocks for part in block.modules()}
    blocks = {block: path for block, path in blocks.items() if not _lies_in_another(block, blocks)}
    for block, path in blocks.items():
        _add_block(made, path, block)
    for site, weight in _convs(network, {network.names[part][0] for part in inside}):
        if isinstance(weight, str):
            made.left_out[site.path] = weight
        elif weight.shape[-2:] != (1, 1):
            made.found.append(Layer(site.path, site.kind, str(site.spec), weight))
    made.found.sort(key=lambda layer: place.get(layer.path, len(place)))
    return made


def _is_one(module: nn.Module) -> bool:
    return isinstance(module, Operator) or sum_of_convs.is_ours(module)


def _lies_in_another(block: nn.Module, blocks: dict[nn.Module, str]) -> bool:
    return any(block is part for other in blocks if other is not block for part in other.modules())


def _add_block(made: Layers, path: str, block: nn.Module) -> None:
    """Add a block; one that is no single kernel any more is left out, with the reason."""
    if isinstance(block, fx.GraphModule):
        spatial = block.get_submodule("spatial")
        made.found.append(Layer(path, _OF_A_SUM, f"{spatial} + 1x1", block))
        return
    assert isinstance(block, Operator)
    if block.spec.kernel == (1, 1):
        return
    why = block.unfoldable() if isinstance(block, Foldable) else None
    kind = block.name if isinstance(block, Block) else type(block).__name__
    layer = Layer(path, kind, str(block.spec), block)
    if why is None and not isinstance(block, Foldable) and not layer.branches():
        why = f"the block {kind} does not say which kernel it computes with"
    if why is None:
        made.found.append(layer)
    else:
        made.left_out[path] = why


def _convs(network: Network, inside: set[str]) -> Iterator[tuple[sites.Site, Tensor | str]]:
    """Give every conv outside of blocks, with the kernel that it uses, or why it has no matrix."""
    surveyed = sites.survey(network)
    for site in surveyed.sites:
        if site.path not in inside:
            yield site, _kernel(network.model, site, surveyed.weights.get(site.path))


def _kernel(model: nn.Module, site: sites.Site, weight: Tensor | None) -> Tensor | str:
    if site.spec is None or weight is None:
        return site.obstacle or f"{site.kind}: only Conv2d has such a matrix"
    if weight.is_complex():
        return "its weight is complex"
    if site.functional is not None or weight.shape[-2:] == (1, 1):
        return weight
    conv = model.get_submodule(site.path)
    found = computed.kernel_of(conv) if isinstance(conv, nn.Conv2d) else weight
    return f"its class {site.kind} {found}" if isinstance(found, str) else found
