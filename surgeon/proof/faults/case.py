"""One place where two models diverge, as the hypotheses see it: what should be there, and what is there.

Both are modules in float64. Where one of them is what the other one was folded into, both are brought to one conv; the
modules that it was folded from are kept, because folds go wrong in ways that only these can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.conv.kernels import Norm, fold_bn
from surgeon.conv.spec import ConvSpec
from surgeon.proof.distance import real, relative_l2
from surgeon.proof.recorder import Recording, far_apart, leaves, run
from surgeon.proof.report import Guess
from surgeon.proof.ulps import off

_OF_OUTPUTS = 16.0  # half units: what rounding the weights of one module may do to its output
_CLEARLY = 4.0  # times nearer to B's tensors it must be
_NEARER = 10.0  # times nearer to what B gives a hypothesis must be than what was expected, or it explains nothing
OF_A_FOLD = 16.0  # units by which a weight may be off that somebody has folded in float32, and that came near zero
Tensors = Mapping[str, Tensor | None]


@dataclass
class Case:
    """A place where B is not what is expected.

    `expected` and `found` are modules in float64, `stored` is B's as it is stored. `origins` are the modules of A that
    `expected` was folded from, in order. `calls` are what the expected module was given in a run, and gave. `others`
    are all modules of the model that B is compared with.
    """

    path: str
    expected: nn.Module
    found: nn.Module
    stored: nn.Module
    origins: Sequence[nn.Module]
    others: Mapping[str, nn.Module]
    calls: Sequence[Recording]
    dtype: torch.dtype
    units: float = 1.0
    outs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.outs = [run([self.found], one) for one in self.calls]

    def guess(self, kind: str, says: str, residual: float = 0.0) -> Guess:
        return Guess(self.path, kind, says, residual)

    # ---- tensors ----------------------------------------------------------------------------------------------------

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """The tensors that are expected, in float64; counters, which decide nothing, are left out."""
        return self._tensors(self.expected)

    @cached_property
    def held(self) -> dict[str, Tensor]:
        """B's tensors as they are stored."""
        return self._tensors(self.stored)

    def _tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Give a module's tensors; of the whole network, whose modules have places of their own, none but its own."""
        return tensors_of(module, recurse=bool(self.path))

    @cached_property
    def off(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Those that both have in one shape, and that are further apart than rounding: what is expected, and B's."""
        both = [(key, self.wanted[key], self.held[key]) for key in self.wanted if key in self.held]
        return {
            key: (one, other)
            for key, one, other in both
            if one.shape == other.shape and one.is_floating_point() and not self._is_near(other, one, self.units)
        }

    def explained(self, predicted: Tensors) -> float | None:
        """Say how far B's tensors are from the expected ones if these were otherwise, as a relative L2.

        None if they are further away than rounding, or not clearly nearer than the expected ones, or if a tensor that
        is off was not predicted. A wrong fold may have been computed in B's dtype.
        """
        if not self.off or not predicted or any(key not in predicted for key in self.off):
            return None
        worst = 0.0
        for key, tensor in predicted.items():
            mine = self.held.get(key)
            if tensor is None or mine is None or mine.shape != tensor.shape:
                return None
            found = relative_l2(mine, tensor)
            if not self._is_near(mine, tensor, OF_A_FOLD if self.origins else self.units):
                return None
            if key in self.off and found * _CLEARLY > relative_l2(mine, self.wanted[key]):
                return None
            worst = max(worst, found)
        return worst

    def changed(self, change: Callable[[Tensor], Tensor | None]) -> float | None:
        """Try one change of every tensor that is off, and say what it leaves unexplained."""
        made = {key: change(one) for key, (one, _) in self.off.items()}
        return self.explained(made) if made and all(one is not None for one in made.values()) else None

    def _is_near(self, stored: Tensor, exact: Tensor, units: float) -> bool:
        """Whether a stored tensor is the expected one, rounded; one that was folded by others is near in size."""
        if off(stored, exact.to(stored.dtype) if stored.dtype == torch.float64 else exact, {stored.dtype}).ulps <= 1:
            return True
        if units <= 1 or not stored.dtype.is_floating_point:
            return False
        far = (stored.double() - exact.double()).abs()
        size = exact.double().abs()
        near = units * torch.finfo(self.dtype).eps * (size + size.mean())
        return bool((far <= near).all())

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @cached_property
    def apart(self) -> float:
        """How far B's outputs are from the expected ones, on the same input."""
        return self._far([one.out for one in self.calls])

    @property
    def limit(self) -> float:
        """How far rounding may put outputs of one module apart."""
        return _OF_OUTPUTS * torch.finfo(self.dtype).eps / 2

    def gives(self, predicted: Sequence[Any], *, cut: Callable[[Tensor], Tensor] | None = None) -> float | None:
        """Say how far B's outputs are from predicted ones; None if that is no explanation of what they are.

        `cut` takes the part of each that is compared.
        """
        found = self._far(predicted, cut)
        before = self._far([one.out for one in self.calls], cut)
        return found if found <= self.limit and found * _NEARER <= before else None

    def on(self, change: Callable[[Tensor], Tensor], *, cut: Callable[[Tensor], Tensor] | None = None) -> float | None:
        """Try one change of what is expected as output, and say what it leaves unexplained."""
        try:
            made = [pytree.tree_map_only(Tensor, change, one.out) for one in self.calls]
        except RuntimeError:  # a map of another form
            return None
        return self.gives(made, cut=cut)

    def behind(self, change: Callable[[Tensor], Tensor]) -> float | None:
        """Try one change of what B gives, and say how far that is from what is expected; None if not near."""
        mine = [None if out is None else pytree.tree_map_only(Tensor, change, out) for out in self.outs]
        pairs = zip(mine, self.calls, strict=True)
        found = max((far_apart(out, one.out) for out, one in pairs), default=math.inf)
        return found if found <= self.limit and found * _NEARER <= self.apart else None

    def made_by(self, module: nn.Module | None) -> float | None:
        """Try a module in place of the expected one, and say how far B's outputs are from its own."""
        if module is None:
            return None
        return self.gives([run([module], one) for one in self.calls])

    def _far(self, outs: Sequence[Any], cut: Callable[[Tensor], Tensor] | None = None) -> float:
        mine = self.outs if cut is None else pytree.tree_map_only(Tensor, cut, self.outs)
        theirs = list(outs) if cut is None else pytree.tree_map_only(Tensor, cut, list(outs))
        if not theirs or any(one is None for one in (*mine, *theirs)):
            return math.inf
        return max(far_apart(one, other) for one, other in zip(mine, theirs, strict=True))

    def maps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give what is expected and what B gives, tensor by tensor, where their shapes are the same."""
        for one, mine in zip(self.calls, self.outs, strict=True):
            for expected, found in zip(leaves(one.out), leaves(mine), strict=False):
                if isinstance(expected, Tensor) and isinstance(found, Tensor) and expected.shape == found.shape:
                    yield real(expected), real(found)


def as_one(modules: Sequence[nn.Module], fold: Callable[[nn.Module], nn.Conv2d | None]) -> nn.Conv2d | None:
    """Give the one conv that modules make in a row: a conv or block, and the norms behind it; None if it is none."""
    first = modules[0]
    conv = first if isinstance(first, nn.Conv2d) else fold(first)
    for norm in modules[1:]:
        if conv is None or not isinstance(getattr(norm, "running_var", None), Tensor):
            return None
        kernel, bias = fold_bn(
            conv.weight.detach().double(),
            None if conv.bias is None else conv.bias.detach().double(),
            Norm.of(norm).double(),
        )
        conv = ConvSpec.of(conv).build_with(kernel.detach(), bias.detach(), like=kernel)
    return conv


def tensors_of(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    """Give a module's tensors without counters, which decide nothing."""
    named = (*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse))
    return {name: tensor.detach() for name, tensor in named if not name.endswith("num_batches_tracked")}
