"""A module of the right class with another setting: eps, a slope, how a pooling rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from surgeon.models.copies import duplicate, kind_of
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.faults.families import family
from surgeon.proof.report import Guess

_NAMES = {"eps": "eps", "track_running_stats": "train mode", "momentum": "momentum"}


class Settings(Hypothesis):
    """The expected module with one setting of B's gives what B gives; it has the right tensors."""

    place = 60

    def guess(self, case: Case) -> Iterator[Guess]:
        if kind_of(case.expected) is not kind_of(case.found) or isinstance(case.expected, nn.Conv2d) or case.off:
            return
        wanted, found = _plain(case.expected), _plain(case.found)
        other = {name: found[name] for name in wanted if name in found and found[name] != wanted[name]}
        if not other:
            return
        residual = None
        if case.calls:
            tried = duplicate(case.expected)
            vars(tried).update(other)
            residual = case.made_by(tried)
        if residual is None and case.apart > case.limit:
            return
        name = next((one for one in _NAMES if one in other), next(iter(other)))
        kind = _NAMES.get(name) or f"{family(case.expected)} changed"
        said = ", ".join(f"{one} = {value} where {wanted[one]} is expected" for one, value in other.items())
        evidence = "" if residual is None else f"; the expected module with that gives what B gives {close(residual)}"
        yield case.guess(kind, f"B has {said}{evidence}", residual or 0.0)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The settings of a module that are numbers, words or rows of them."""
    values = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, bool | int | float | str | tuple | None) and not isinstance(value, Tensor)
    }
