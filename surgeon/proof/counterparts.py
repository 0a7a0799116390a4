"""Which tensors of two models are compared after a step, and how far apart they are.

    outputs      ‖y − x‖ / ‖x‖
    statistics   ‖y − x‖ / ‖x‖ after the step, and ‖Δy − Δx‖ / ‖Δx‖ of what the step has changed
    gradients    ‖y − x‖ / ‖x‖

What is small beside the others of its kind is measured on their scale, because a gradient that cancels to nothing in
front of a norm is rounding alone. That scale is a millionth of the largest, and for what a step has changed a
ten-thousandth of the statistic itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from surgeon.proof.distance import are_finite, is_matched, pooled, real, relative_l2
from surgeon.proof.steps import How, Step
from surgeon.proof.ulps import is_same_bits

_SMALL = 1e-6  # of the largest of a kind
_LITTLE = 1e-4  # of a statistic
_NAMED = 3  # names in a sentence

Kind = Literal["output", "statistic", "gradient"]
Names = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Counterparts:
    """Tensors that both models have, by the first one's names: the names in both. `alone`: parameters without any.

    `frozen`: parameters of which neither model needs a gradient; `half_frozen`: one of the two does.
    """

    statistics: Names = field(default_factory=dict)
    gradients: Names = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    half_frozen: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()  # statistics of the first model that the other has not

    def of_one(self, side: Literal[0, 1]) -> Counterparts:
        """Compare one of the models with itself, under the names of the first."""
        both = (self.statistics, self.gradients)
        statistics, gradients = ({name: (pair[side], pair[side]) for name, pair in one.items()} for one in both)
        return Counterparts(statistics, gradients)

    def remarks(self, how: How) -> Iterator[str]:
        """Say which gradients and statistics were not compared, and why."""
        if self.unheard and how.is_training:
            yield f"{_some(self.unheard, 'statistic')} of A have no counterpart in B, and were not compared"
        if not how.gradients:
            return
        if self.frozen:
            yield f"gradients of {_some(self.frozen, 'parameter')} were not compared: both models have them frozen"
        for name in self.half_frozen[:_NAMED]:
            yield f"{name} needs a gradient in one model, and is frozen in the other: its gradient was not compared"
        if self.alone:
            named = _some(self.alone, "parameter")
            yield f"gradients of {named} of A were not compared: nothing in B has their numbers in the same role"


def find(
    a: nn.Module, b: nn.Module, name_in_b: Callable[[str], str], is_same: Callable[[Tensor, Tensor], bool]
) -> Counterparts:
    """Find the tensors of two models that are compared: of one name and shape, and parameters with the same numbers.

    A parameter with other numbers has another role: the kernel of a conv that a norm was folded into, say.
    """
    theirs = {**dict(b.named_parameters(remove_duplicate=False)), **dict(b.named_buffers(remove_duplicate=False))}
    statistics = {name: (name, name_in_b(name)) for name, _ in a.named_buffers()}
    unheard = [name for name, (_, other) in statistics.items() if other not in theirs]
    there = {
        name: (mine, other)
        for (name, mine) in a.named_parameters()
        if (other := theirs.get(name_in_b(name))) is not None and mine.shape == other.shape and is_same(mine, other)
    }
    gradients: dict[str, tuple[str, str]] = {}
    frozen: list[str] = []
    half: list[str] = []
    for name, pair in there.items():
        needs = [one.requires_grad for one in pair]
        if all(needs):
            gradients[name] = (name, name_in_b(name))
        else:
            (half if any(needs) else frozen).append(name)
    alone = tuple(name for name, mine in a.named_parameters() if name not in there and mine.requires_grad)
    heard = {name: pair for name, pair in statistics.items() if name not in unheard}
    return Counterparts(heard, gradients, alone, tuple(frozen), tuple(half), tuple(unheard))


def distances(names: Counterparts, x: Step, y: Step, *, is_training: bool) -> dict[tuple[Kind, str], float]:
    """Measure how far step y is from step x, in everything that they have in common."""
    found: dict[tuple[Kind, str], float] = {}
    if is_training and not is_matched(y.out, x.out):
        found["output", "0"] = math.inf
    elif is_training:
        for i, one in enumerate(pooled([y.out], [x.out])):
            found["output", str(i)] = max(one.l2, one.flips / one.count)
    for name, (mine, other) in names.statistics.items() if is_training else ():
        floor = _SMALL * max(_size(x.after[key]) for key in x.after if _owner(key) == _owner(mine))
        pair_x, pair_y = (x.before[mine], x.after[mine]), (y.before[other], y.after[other])
        found["statistic", name] = _after(pair_x, pair_y, floor)
    inputs = {key: (key, key) for key in x.gradients.keys() | y.gradients.keys() if key.startswith("input ")}
    for group in (inputs, names.gradients):
        scale = max((_size(x.gradients.get(mine)) for mine, _ in group.values()), default=0.0)
        for name, (mine, other) in group.items() if x.gradients or y.gradients else ():
            pair = x.gradients.get(mine), y.gradients.get(other)
            found["gradient", name] = _of_gradient(*pair, _SMALL * scale)
    return found


def _after(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], floor: float) -> float:
    """Compare what a buffer is after a step, if both began with the same, and how the step has moved it."""
    if any(one.shape != x[1].shape for one in (*x, *y)):  # one of another size is a cache
        return 0.0
    if not x[1].is_floating_point() and not x[1].is_complex():
        return 0.0 if bool((x[1] - y[1] == x[0] - y[0]).all()) else math.inf
    steps = [after.double() - before.double() for before, after in (x, y)]
    moved = _apart(steps[1], steps[0], max(floor, _LITTLE * _size(x[1])))
    return max(moved, _apart(y[1], x[1], floor)) if is_same_bits(x[0], y[0]) else moved


def _of_gradient(x: Tensor | None, y: Tensor | None, floor: float) -> float:
    """Compare two gradients; one that is missing is nothing but zeros."""
    if x is None or y is None:
        given = y if x is None else x
        return 0.0 if given is None or not given.count_nonzero() else math.inf
    return _apart(y, x, floor)


def _apart(y: Tensor, x: Tensor, floor: float) -> float:
    """‖y − x‖ / ‖x‖, where x counts as at least `floor` in the root mean square."""
    if y.shape != x.shape:
        return math.inf
    one, other = real(x).double(), real(y).double()
    if not are_finite(one, other) or floor == 0:
        return relative_l2(other, one)
    size = max(float(one.norm()), floor * math.sqrt(one.numel()))
    return float((other - one).norm()) / size if size else 0.0


def _size(tensor: Tensor | None) -> float:
    """The root mean square; 0 where it is not finite."""
    if tensor is None or not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    found = float(real(tensor).double().square().mean().sqrt())
    return found if math.isfinite(found) else 0.0


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _some(names: tuple[str, ...], what: str) -> str:
    named = ", ".join(names[:_NAMED]) + ", …" * (len(names) > _NAMED)
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({named})"
