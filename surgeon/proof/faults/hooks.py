"""Hooks: code that somebody has put before or behind a module of B."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surgeon.proof.faults.base import Hypothesis
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_HOOKS = {"_forward_pre_hooks": "before", "_forward_hooks": "behind"}


class Hooks(Hypothesis):
    """B's module has a forward hook that the expected one does not have, or has lost one."""

    place = 20

    def guess(self, case: Case) -> Iterator[Guess]:
        for name, where in _HOOKS.items():
            mine, theirs = _named(case.found, name), _named(case.expected, name)
            if added := sorted(mine - theirs):
                yield case.guess("a hook", f"a hook of B runs {where} it, which is not expected: {', '.join(added)}")
            elif lost := sorted(theirs - mine):
                yield case.guess("a hook", f"a hook that should run {where} it is missing: {', '.join(lost)}")


def _named(module: nn.Module, attribute: str) -> set[str]:
    hooks = getattr(module, attribute, {}).values()
    return {getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks}
