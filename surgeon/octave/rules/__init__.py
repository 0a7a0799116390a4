"""What the steps of a graph do to two streams: one class for each kind of step, found by listing this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from surgeon.octave.layout import Step
from surgeon.octave.rules.base import StreamRule, WholeMap

_NEEDS_WHOLE_MAP = WholeMap()


@cache
def rules() -> tuple[StreamRule, ...]:
    """Make one instance of every rule in this folder, sorted by the names of their files."""
    found: list[StreamRule] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, StreamRule)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__ and kind is not WholeMap]
        found += [kind() for kind in own if not inspect.isabstract(kind)]
    return tuple(found)


def rule_of(step: Step) -> StreamRule:
    """Find the rule of a step; a step that no rule matches needs the whole map.

    >>> from torch import fx, nn
    >>> graph = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten())).graph
    >>> [rule_of(Step(node, {"0": nn.ReLU(), "1": nn.Flatten()})).name for node in graph.nodes]
    ['input', 'elementwise', 'other', 'other']
    """
    if step.is_customised:
        return _NEEDS_WHOLE_MAP
    return next((rule for rule in rules() if rule.matches(step)), _NEEDS_WHOLE_MAP)
