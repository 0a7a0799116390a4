"""A norm that was folded wrongly: without σ, γ, β or its mean, with another eps, with the wrong sign, or twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from surgeon.blocks import Foldable
from surgeon.conv.kernels import Norm
from surgeon.models.copies import duplicate
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case, as_one
from surgeon.proof.report import Guess

_EPS = (0.0, 1e-5, 1e-3, 1e-6, 1e-12, 1e-8, 1e-2)
Change = Callable[[nn.Module], None]


class Folds(Hypothesis):
    """Folded with one mistake, the block or the conv and norm that B's conv was made from give B's conv."""

    place = 90

    def guess(self, case: Case) -> Iterator[Guess]:
        if not case.origins or not case.off or not any(map(_is_norm, _modules(case.origins))):
            return
        for kind, says, change in _mistakes():
            residual = _with(case, change)
            if residual is not None:
                yield case.guess(kind, f"folded {says}, A's modules give B's conv {close(residual)}", residual)
        yield from _of_rows(case)


def _of_rows(case: Case) -> Iterator[Guess]:
    """Norms in the row that were left out, or applied twice."""
    rest = [module for module in case.origins[1:] if _is_norm(module)]
    if not rest:
        return
    for kind, says, row in (
        ("norm missing", "without its norm", case.origins[:1]),
        ("folded twice", "with its norm twice", [*case.origins, *rest]),
    ):
        residual = _explained(case, [duplicate(one) for one in row])
        if residual is not None:
            yield case.guess(kind, f"folded {says}, A's modules give B's conv {close(residual)}", residual)


def _mistakes() -> Iterator[tuple[str, str, Change]]:
    yield "scale missing", "without σ", lambda norm: _set(norm, running_var=1 - _eps(norm))
    yield "scale missing", "without γ", lambda norm: _set(norm, weight=1.0)
    yield "sign", "with the mean added instead of subtracted", lambda norm: _set(norm, running_mean=-_mean(norm))
    yield "mean lost", "without the running mean", lambda norm: _set(norm, running_mean=0.0)
    yield "bias lost", "without β", lambda norm: _set(norm, bias=0.0)
    yield "bias lost", "without its mean and β", lambda norm: _set(norm, running_mean=0.0, bias=0.0)
    fresh = "with the running statistics of a new norm"
    yield "statistics", fresh, lambda norm: _set(norm, running_mean=0.0, running_var=1.0)
    for eps in _EPS:
        words = "without eps" if eps == 0 else f"with eps = {eps:g}"
        yield "eps", words, _with_eps(eps)
    yield "folded twice", "with γ/σ applied twice", _twice


def _with_eps(eps: float) -> Change:
    def change(norm: nn.Module) -> None:
        vars(norm)["eps"] = eps

    return change


def _twice(norm: nn.Module) -> None:
    """Make a norm do what it does to its own result."""
    numbers = Norm.of(norm)
    scale = numbers.weight / torch.sqrt(numbers.var + numbers.eps)
    bias = numbers.bias + scale * (numbers.bias - numbers.mean)
    _set(norm, weight=numbers.weight * scale, bias=bias)


def _eps(norm: nn.Module) -> float:
    return Norm.of(norm).eps


def _mean(norm: nn.Module) -> Tensor:
    return Norm.of(norm).mean


def _set(norm: nn.Module, **values: Tensor | float) -> None:
    for name, value in values.items():
        tensor = getattr(norm, name)
        if isinstance(tensor, Tensor):
            tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype).expand_as(tensor))


def _with(case: Case, change: Change) -> float | None:
    row = [duplicate(one) for one in case.origins]
    with torch.no_grad():
        for norm in filter(_is_norm, _modules(row)):
            change(norm)
    return _explained(case, row)


def _explained(case: Case, row: Sequence[nn.Module]) -> float | None:
    conv = as_one(row, folded)
    if conv is None:
        return None
    bias = torch.zeros(conv.out_channels, dtype=conv.weight.dtype) if conv.bias is None else conv.bias.detach()
    predicted = {"weight": conv.weight.detach(), "bias": bias}
    return case.explained({key: one for key, one in predicted.items() if key in case.held})


def folded(module: nn.Module) -> nn.Conv2d | None:
    """Fold a block; None if it is none, or cannot be folded as it is."""
    if not isinstance(module, Foldable) or module.unfoldable() is not None:
        return None
    with torch.no_grad():
        return module.fold()


def _modules(row: Sequence[nn.Module]) -> list[nn.Module]:
    return [one for module in row for one in module.modules()]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor) and isinstance(getattr(module, "eps", None), float)
