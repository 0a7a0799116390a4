"""How much a network may take that a file, not the user, asks for: a manifest can name any size of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from surgeon._torch_compat import TorchDispatchMode, makes_new_tensors, pytree

_LEAST = 2**30  # bytes that may be made while a network is built, whatever the file holds
_SHARE = 16  # … and as many times what the file holds: a thinned out conv can be a tenth of what it was made from
_LARGEST = 2**20  # number among the arguments
_LONGEST = 10_000  # characters or entries of an argument


class Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made, and raises once there are too many."""

    def __init__(self, stored: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = max(_LEAST, _SHARE * stored)
        self.made = 0

    @property
    def is_spent(self) -> bool:
        return self.made > self.most

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if makes_new_tensors(func):
            leaves = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
            self.made += 256 + sum(leaf.numel() * leaf.element_size() for leaf in leaves)
            if self.is_spent:
                raise MemoryError(f"more than {self.most:,} bytes")
        return made


def is_modest(argument: Any, depth: int = 0) -> bool:
    """Whether an argument of a factory is a plain value of a size that networks have.

    >>> is_modest([3, 4, 6, 3]), is_modest({"depth": 10**9})
    (True, False)
    """
    if isinstance(argument, bool | None):
        return True
    if isinstance(argument, int | float):
        return abs(argument) <= _LARGEST
    if not isinstance(argument, str | list | tuple | dict) or len(argument) > _LONGEST or depth > 4:
        return False
    parts = argument.values() if isinstance(argument, dict) else argument
    return isinstance(argument, str) or all(is_modest(part, depth + 1) for part in parts)
