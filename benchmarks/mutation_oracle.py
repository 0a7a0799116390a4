"""What a fault changes, measured without anything of `surgeon.proof`: plain float64, and hooks on modules.

Every leaf of the right model runs on its inputs; the module of the same name in the wrong one is given the same inputs.
How far that is beyond rounding is told by the right model itself, with every number moved by one unit at random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DRAWS = 3
BEYOND = 16  # times what one unit does: no fold in the dtype, and no cast to it, moves a site so far
EXACT = 1e-10  # relative L2 in float64


@dataclass(frozen=True)
class Call:
    path: str
    args: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class Moved:
    """How far a wrong model is from the right one: at the outputs, at the worst module, and on unusual inputs."""

    output: float
    site: float
    path: str | None
    output_ratio: float  # to what one unit does there
    site_ratio: float
    wild: float
    units: float  # the largest change of a stored number, in units in the last place
    drift: float  # the largest mean change of a stored tensor

    def is_due(self, *, has_lineage: bool) -> bool:
        """Whether a verifier has to see it."""
        if not has_lineage:
            return max(self.output_ratio, self.site_ratio) > BEYOND
        if math.isinf(self.units):
            return True  # other tensors are stored, or other dtypes
        if self.units and self.units < 1.5 and self.drift < 0.5:
            return False  # rounding might have done it
        return max(self.output, self.site, self.wild) > EXACT


class Oracle:
    """A right model, what it does on inputs, and what rounding does to it."""

    def __init__(self, right: nn.Module, side: int, seed: int, channels: int = 3) -> None:
        self.right, self.dtype = right, next(right.parameters()).dtype
        self.exact = copy.deepcopy(right).eval().double()
        generator = torch.Generator().manual_seed(seed)
        self.inputs = [torch.randn(2, channels, side, side, generator=generator, dtype=torch.float64) for _ in range(2)]
        sizes = ((side, 300.0), (side + 8, 1.0), (side * 2, 0.01))
        self.wild = [torch.randn(2, channels, s, s, generator=generator, dtype=torch.float64) * by for s, by in sizes]
        self.own = [x.to(self.dtype) for x in self.inputs[:1]]
        self.calls = [observe(self.exact, x) for x in self.inputs]
        jitters = [jittered(right, generator) for _ in range(DRAWS)]
        self.noise = _Noise(*_largest([_distances(self.exact, self.calls, j, self.inputs) for j in jitters]))

    def moved(self, wrong: nn.Module) -> Moved:
        """Measure what is different in a wrong model."""
        spoilt = copy.deepcopy(wrong).eval().double()
        output, sites = _distances(self.exact, self.calls, spoilt, self.inputs)
        if not self._is_alike(wrong):
            output = math.inf
        floor = torch.finfo(self.dtype).eps / 4
        ratios = {path: far / max(self.noise.sites.get(path, 0), floor) for path, far in sites.items()}
        path = max(ratios, key=lambda one: ratios[one], default=None)
        units, drift = units_between(self.right, wrong)
        wild = max((_apart(run(self.exact, x), run(spoilt, x)) for x in self.wild), default=0.0)
        return Moved(
            output=output,
            site=max(sites.values(), default=0.0),
            path=path if path and sites[path] > 0 else None,
            output_ratio=output / max(self.noise.output, floor),
            site_ratio=ratios.get(path or "", 0.0),
            wild=wild,
            units=units,
            drift=drift,
        )

    def _is_alike(self, wrong: nn.Module) -> bool:
        """Whether outputs in the models' own dtype have the same structure, shapes and dtypes."""
        for x in self.own:
            one, other = run(copy.deepcopy(self.right).eval(), x), run(copy.deepcopy(wrong).eval(), x)
            if isinstance(other, str) or _shape(one) != _shape(other):
                return False
        return True


@dataclass(frozen=True)
class _Noise:
    output: float
    sites: dict[str, float]


def run(model: nn.Module, x: Tensor) -> Any:
    """Run a model; one that does not run gives what it says."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def observe(model: nn.Module, x: Tensor) -> tuple[Any, list[Call]]:
    """Run a model and keep what goes into every leaf, and comes out of it."""
    calls: list[Call] = []
    hooks = []
    for path, module in model.named_modules():
        if not any(True for _ in module.children()):

            def keep(m: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
                calls.append(Call(path, pytree.tree_map(_copied, args), pytree.tree_map(_copied, output)))

            hooks.append(module.register_forward_hook(keep))
    output = run(model, x)
    for hook in hooks:
        hook.remove()
    return output, calls


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def jittered(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give a float64 copy in which every number was moved by one unit of its dtype, up or down."""
    new = copy.deepcopy(model).eval()
    with torch.no_grad():
        for tensor in (*new.parameters(), *new.buffers()):
            if tensor.is_floating_point():
                to = (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.dtype) * 2 - 1
                moved = torch.nextafter(tensor, to * torch.inf)
                tensor.copy_(torch.where(tensor == 0, tensor, moved))
    return new.double()


def _distances(
    right: nn.Module, calls: Sequence[tuple[Any, list[Call]]], wrong: nn.Module, inputs: Sequence[Tensor]
) -> tuple[float, dict[str, float]]:
    outputs, sites = 0.0, {}
    modules = dict(wrong.named_modules())
    for x, (output, made) in zip(inputs, calls, strict=True):
        outputs = max(outputs, _apart(output, run(wrong, x)))
        for call in made:
            module = modules.get(call.path)
            far = math.inf if module is None else _apart(call.output, _on(module, call))
            sites[call.path] = max(sites.get(call.path, 0.0), far)
    return outputs, sites


def _on(module: nn.Module, call: Call) -> Any:
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return module(*pytree.tree_map(_copied, call.args))
    except Exception as error:
        return str(error)


def _shape(output: Any) -> Any:
    leaves, structure = pytree.tree_flatten(output)
    return structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _apart(right: Any, wrong: Any) -> float:
    """Give the relative L2 of the worst output; of whole numbers, the share that differs."""
    if isinstance(right, str):
        return 0.0  # the right one does not run on it, so nothing is asked
    (one, structure), (other, found) = pytree.tree_flatten(right), pytree.tree_flatten(wrong)
    if structure != found or isinstance(wrong, str):
        return math.inf
    return max((_of_tensors(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _of_tensors(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a == b else math.inf
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return math.inf
    if not a.is_floating_point():
        return float((a != b).double().mean())
    a, b = a.double(), b.double()
    odd = ~(a.isfinite() & b.isfinite())
    if bool((odd & ~((a == b) | (a.isnan() & b.isnan()))).any()):
        return math.inf
    a, b = a[~odd], b[~odd]
    far = float((a - b).norm())
    return far / float(a.norm()) if far and float(a.norm()) else (math.inf if far else 0.0)


def units_between(right: nn.Module, wrong: nn.Module) -> tuple[float, float]:
    """Give the largest change of a stored number, and the largest mean change of a tensor, in units of its dtype."""
    one, other = right.state_dict(), wrong.state_dict()
    if one.keys() != other.keys():
        return math.inf, math.inf
    most, drift = 0.0, 0.0
    for key, a in one.items():
        b = other[key]
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        if a.shape != b.shape or a.dtype != b.dtype or not bool(b.isfinite().all()):
            return math.inf, math.inf
        size = (torch.nextafter(a.abs(), torch.full_like(a, torch.inf)) - a.abs()).double()
        change = (b.double() - a.double()) / size.clamp_min(torch.finfo(torch.float64).tiny)
        if change.numel():
            most = max(most, float(change.abs().max()))
            drift = max(drift, abs(float(change.mean())))
    return most, drift


def _largest(found: Sequence[tuple[float, dict[str, float]]]) -> tuple[float, dict[str, float]]:
    sites = {path: max(one[1].get(path, 0.0) for one in found) for path in found[0][1]}
    return max(one[0] for one in found), sites
