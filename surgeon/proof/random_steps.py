"""Random steps of a network, such as dropout, that draw the same numbers in two models.

Before each call of a module that may draw random numbers every random state starts from a hash of the seed, the name of
the module and the number of the call, and afterwards it is what it was. So a random module that one model lacks, or
another order of calls, shifts nothing in the others. What code outside of such modules draws, `F.dropout` in the
forward of a whole block for example, has no name: it is drawn in order from the seed of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from surgeon.blocks import Operator
from surgeon.models.sandbox import drawn_from, random_states_kept

_STEADY = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *("conv", "linear", "batchnorm", "normalization", "instancenorm", "padding", "pixelshuffle", "upsampling"),
        *("flatten", "fold", "channelshuffle", "activation", "pooling"),
    )
)  # files of torch whose modules draw nothing, with few exceptions
_EXCEPTIONS = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


class Drawn:
    """What a run has drawn: in which modules, how often, and in which state it has left all that has no name."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.start: list[Any] = []
        self.end: list[Any] = []

    @property
    def outside(self) -> bool:
        """Whether code outside of random modules has drawn numbers."""
        return self.start != self.end

    def unlike(self, other: Drawn) -> Iterator[str]:
        """Say which random steps cannot be made alike in two models, by the names of the first."""
        for name in sorted(self.calls.keys() | other.calls.keys()):
            if (mine := self.calls[name]) != (theirs := other.calls[name]):
                yield f"{name} draws random numbers in {mine} of its calls in A, and in {theirs} in B"
        if self.end != other.end:
            yield (
                "code outside of the random modules draws other random numbers in B than in A; it has no names, so it "
                "is seeded in order"
            )


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int, names: Mapping[str, str]) -> Iterator[Drawn]:
    """Seed every call of a module of this copy that may draw; `names` gives the name that decides, if it is another."""
    found, numbers = Drawn(), Counter[str]()
    opened: dict[str, list[tuple[contextlib.ExitStack, list[Any]]]] = defaultdict(list)
    handles: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _args: Any) -> None:
            numbers[path] += 1
            stack = contextlib.ExitStack()
            stack.enter_context(random_states_kept(_seed_of(seed, path, numbers[path])))
            opened[path].append((stack, drawn_from()))

        def after(_module: nn.Module, _args: Any, _out: Any) -> None:
            if opened[path]:
                stack, start = opened[path].pop()
                found.calls[path] += drawn_from() != start
                stack.close()

        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    for path, module in _may_draw(model):
        watch(names.get(path, path), module)
    found.start = found.end = drawn_from()
    try:
        yield found
        found.end = drawn_from()
    finally:
        for handle in handles:
            handle.remove()


def _may_draw(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the innermost modules but those that draw nothing; hooks in a block would change how it is computed."""
    within: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Operator):
            within.append(f"{path}.")
        elif not any(True for _ in module.children()) and not any(map(path.startswith, within)):
            home = type(module).__module__
            is_steady = home in _STEADY and not isinstance(module, _EXCEPTIONS)
            if not is_steady and home != "surgeon.nn" and type(module) is not nn.Identity:
                yield path, module


def _seed_of(seed: int, name: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}:{name}".encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8]) >> 1
