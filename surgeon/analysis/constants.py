"""What a graph computes from parameters alone: known before any input is, as numbers and tensors in float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

_RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "poisson", "uniform", "exponential", "cauchy")
_HOMES = ("torch", "_operator", "builtins", "math")


class Constants:
    """The constants of one graph, each computed once."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._known: dict[fx.Node, Any] = {}

    def of(self, value: Any) -> Any:
        """Give a number or tensor that a step is given; None where it depends on the input."""
        if not isinstance(value, fx.Node):
            return value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if value not in self._known:
            self._known[value] = self._computed(value)
        return self._known[value]

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            found: Any = self.root
            for part in str(node.target).split("."):
                found = getattr(found, part, None)
            return found.detach().double() if isinstance(found, Tensor) and found.is_floating_point() else None
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes or not _is_pure(node):
            return None
        known = {one: self.of(one) for one in node.all_input_nodes}
        if any(one is None for one in known.values()):
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        try:
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        except Exception:  # in float64, say: it is the user's code
            return None


def by_channel(value: Any) -> Tensor | float | None:
    """Read a number, or one for each channel, (…, c, 1, 1) or (…, c), as (c,); None where it is neither."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Tensor):
        return None
    if value.numel() == 1:
        return float(value)
    return value.flatten() if space_of(value) else None


def space_of(value: Any) -> str:
    """Say whether a tensor has a number for each channel of maps ('map'), of vectors ('vector'), or neither ('')."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return ""
    if 3 <= value.dim() <= 4 and value.shape[-3] == value.numel():
        return "map"
    return "vector" if value.dim() <= 3 and value.shape[-1] == value.numel() else ""


def _is_pure(node: fx.Node) -> bool:
    """Whether a step of the user's graph is one of torch's functions, draws nothing, and changes nothing in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    home = "torch" if isinstance(node.target, str) else (getattr(node.target, "__module__", None) or "torch")
    changes = name.endswith("_") and not name.endswith("__")
    return home.partition(".")[0] in _HOMES and not changes and not any(word in name for word in _RANDOM)
