"""nn.Module → islands: the largest submodules whose graph is known.

Where no graph of a module can be trusted (`trace`), its own Python stays as it is, and its children are tried.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import fx, nn

from surgeon._torch_compat import ConvNd
from surgeon.analysis.run import Run, observe
from surgeon.analysis.trace import may_convolve, trace
from surgeon.blocks import Operator
from surgeon.errors import CaptureError
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.sandbox import quietly

_LARGE = 2**24  # numbers


@dataclass(frozen=True, slots=True)
class Island:
    """A submodule at `path` ('' is the model itself) and its graph; targets are relative to it."""

    path: str
    graph: fx.Graph


@dataclass(frozen=True, slots=True)
class Opaque:
    """A submodule whose own Python could not be followed, and why."""

    path: str
    reason: str


@dataclass(slots=True)
class Capture:
    islands: list[Island] = field(default_factory=list)
    opaque: list[Opaque] = field(default_factory=list)


def capture(model: nn.Module, inputs: Inputs | None = None, run: Run | None = None) -> Capture:
    """Find the islands of a model; `inputs` tell which of its optional arguments it is called with.

    `run` is what a run has shown, if there was one. Where the model itself is not an island, the run tells which
    modules are not called as a whole.

    >>> [island.path for island in capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).islands]
    ['']
    """
    with quietly():
        found = _explored(model, inputs, frozenset())
        if found.opaque and inputs is not None:
            taken_apart = (run or _glimpse(model, inputs)).taken_apart
            if any(island.path in taken_apart for island in found.islands):
                found = _explored(model, inputs, taken_apart)
    return found


def _glimpse(model: nn.Module, inputs: Inputs) -> Run:
    """Run the model if that works; on a large input, which a file may have named, only on the meta device."""
    try:
        is_large = inputs.numel > _LARGE
        return observe(model, inputs if is_large else inputs.drawn(0), meta_only=is_large)
    except CaptureError:
        return Run()


def _explored(model: nn.Module, inputs: Inputs | None, taken_apart: AbstractSet[str]) -> Capture:
    found = Capture()
    _explore(shadow(model), "", found, set(), inputs or Inputs(), taken_apart)
    return found


def _explore(
    module: nn.Module, path: str, found: Capture, seen: set[nn.Module], inputs: Inputs, taken_apart: AbstractSet[str]
) -> None:
    if module in seen or isinstance(module, Operator | ConvNd) or not may_convolve(module):
        return
    seen.add(module)
    if path in taken_apart:
        found.opaque.append(Opaque(path, "the network calls its submodules, not the module itself"))
    elif not isinstance(module, nn.ModuleList | nn.ModuleDict):
        graph = trace(module, None if path else inputs)
        if isinstance(graph, fx.Graph):
            found.islands.append(Island(path, graph))
            return
        found.opaque.append(Opaque(path, graph))
    for name, child in module.named_children():
        _explore(child, f"{path}.{name}" if path else name, found, seen, inputs, taken_apart)
