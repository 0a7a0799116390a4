"""What `verify` asks of what was measured: one file for each question, found by listing this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from functools import cache

from surgeon.proof.checks.base import Question
from surgeon.proof.evidence import Evidence
from surgeon.proof.report import Check


@cache
def questions() -> tuple[Question, ...]:
    """Make one instance of every question in this folder, in the order of their places.

    >>> [one.name for one in questions()]
    ['mathematics', 'operators', 'blocks', 'storage', 'same tensors', 'sites', 'wiring', 'rounding', 'finite',
     'other inputs', 'stored tensors', 'structure', 'modules', 'training', 'statistics', 'gradients', 'train settings']
    """
    found: list[Question] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Question)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        found += [kind() for kind in own if not inspect.isabstract(kind)]
    return tuple(sorted(found, key=lambda one: (one.place, one.name)))


def checks(evidence: Evidence, *, approximate: bool) -> Sequence[Check]:
    """Ask every question; if B was not meant to compute what A does, only those that apply to approximations."""
    asked = [one for one in questions() if one.is_for_approximate or not approximate]
    return [check for question in asked for check in question.ask(evidence)]
