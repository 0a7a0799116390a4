"""The expected map, scaled, moved by a pixel, transposed, or with its images in another order, is what B gives."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from surgeon._torch_compat import pytree
from surgeon.proof.distance import relative_l2
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.recorder import Recording, run
from surgeon.proof.report import Guess

_BORDER = 3
_ROWS = {"down": 1, "up": -1, "": 0}
_COLUMNS = {"to the right": 1, "to the left": -1, "": 0}
_WAYS = {
    " and ".join(filter(None, (one, other))): (by, across)
    for one, by in _ROWS.items()
    for other, across in _COLUMNS.items()
    if by or across
}


class Maps(Hypothesis):
    """The expected result, changed as a whole, is B's; B's weights do not tell why."""

    place = 120

    def guess(self, case: Case) -> Iterator[Guess]:
        if case.off or case.apart <= case.limit or not case.calls:
            return
        for kind, says, change in (
            ("images reversed", "the images of the batch in reversed order", lambda y: y.flip(0)),
            ("axes exchanged", "height and width exchanged", lambda y: y.mT if y.dim() > 2 else y),
            ("sign", "the other sign", lambda y: -y),
        ):
            if (residual := case.on(change)) is not None:
                yield case.guess(kind, f"with {says}, what is expected is what B gives {close(residual)}", residual)
        yield from _counted(case)
        yield from _scaled(case)
        yield from _moved(case)
        yield from _at_borders(case)


def _scaled(case: Case) -> Iterator[Guess]:
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in case.maps() if a.is_floating_point()]
    if not pairs:
        return
    size = sum(float(a @ a) for a, _ in pairs)
    factor = sum(float(a @ b) for a, b in pairs) / size if size else 1.0
    if (residual := case.on(lambda y: y * factor if y.is_floating_point() else y)) is not None:
        says = f"scaled by {factor:.6g}, what is expected is what B gives {close(residual)}"
        yield case.guess("scale", says, residual)


def _counted(case: Case) -> Iterator[Guess]:
    """Whole numbers that are all off by the same."""
    steps = {
        int(one)
        for a, b in case.maps()
        if not a.is_floating_point()
        for one in (b.long() - a.long()).flatten().tolist()
    }
    if len(steps) == 1 and 0 not in steps:
        yield case.guess("labels shifted", f"every whole number that B gives is off by {steps.pop():+d}")


def _moved(case: Case) -> Iterator[Guess]:
    for way, (rows, columns) in _WAYS.items():
        for what, change in (("result", _on_result), ("input", _on_input)):
            made = [change(case, one, rows, columns) for one in case.calls]
            if any(one is None for one in made):
                continue
            if (residual := case.gives(made, cut=_inside)) is not None:
                says = f"with its {what} moved {way} by one pixel, the expected module gives what B gives inside"
                yield case.guess(
                    "padding amount", f"{says} {close(residual)}: the padding lies on other sides", residual
                )


def _on_result(case: Case, one: Recording, rows: int, columns: int) -> object:
    return pytree.tree_map_only(Tensor, lambda y: _rolled(y, rows, columns), one.out)


def _on_input(case: Case, one: Recording, rows: int, columns: int) -> object:
    args, kwargs = pytree.tree_map_only(Tensor, lambda y: _rolled(y, rows, columns), (one.args, one.kwargs))
    return run([case.expected], Recording(args, kwargs, None))


def _rolled(tensor: Tensor, rows: int, columns: int) -> Tensor:
    if tensor.dim() < 4:
        return tensor
    h, w = tensor.shape[-2:]
    padded = F.pad(tensor, (1, 1, 1, 1))
    return padded[..., 1 - rows : 1 - rows + h, 1 - columns : 1 - columns + w]


def _at_borders(case: Case) -> Iterator[Guess]:
    pairs = [(_inside(a), _inside(b)) for a, b in case.maps() if a.dim() == 4]
    if not pairs or any(
        not a.numel() or a.shape == whole.shape for (a, _), (whole, _) in zip(pairs, case.maps(), strict=False)
    ):
        return
    residual = max(relative_l2(b, a) for a, b in pairs)
    if residual <= case.limit and residual * 10 <= case.apart:
        says = f"B differs at the borders of its maps alone, and agrees inside {close(residual)}"
        yield case.guess("padding mode", says, residual)


def _inside(tensor: Tensor) -> Tensor:
    """Cut off the borders of a map, as far as it has an inside."""
    border = min(_BORDER, (min(tensor.shape[-2:]) - 1) // 2) if tensor.dim() == 4 else 0
    return tensor[..., border:-border, border:-border] if border else tensor
