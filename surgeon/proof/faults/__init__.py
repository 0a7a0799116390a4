"""What probably went wrong where B diverges: one file for each kind of fault, found by listing this folder."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
from functools import cache

from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess


@cache
def hypotheses() -> tuple[Hypothesis, ...]:
    """Make one instance of every hypothesis in this folder, in the order of their places."""
    found: list[Hypothesis] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Hypothesis)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        found += [kind() for kind in own if not inspect.isabstract(kind)]
    return tuple(sorted(found, key=lambda one: (one.place, type(one).__name__)))


def guess(case: Case) -> Guess | None:
    """Give the first fault that explains how B differs at one place; None where nothing does."""
    for one in hypotheses():
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):  # sparse or quantised tensors, say
            if (found := next(one.guess(case), None)) is not None:
                return found
    return None
