"""Another layer in place: an activation changed, missing or added; a pooling of another kind; a layer left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.blocks import Operator
from surgeon.models.copies import kind_of
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.faults.families import family
from surgeon.proof.recorder import leaves
from surgeon.proof.report import Guess

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "SiLU": F.silu,
    "GELU": F.gelu,
    "hard-swish": F.hardswish,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}


class Activations(Hypothesis):
    """Behind the expected module an activation gives what B gives, or the other way round."""

    place = 45

    def guess(self, case: Case) -> Iterator[Guess]:
        if case.off:
            return
        for name, function in _ACTIVATIONS.items():
            if (residual := case.on(function)) is not None:
                says = f"B's result went through one more {name}: of what is expected, that gives B's {close(residual)}"
                yield case.guess("activation added", says, residual)
            elif (residual := case.behind(function)) is not None:
                says = f"{name} is missing: of what B gives, it makes what is expected {close(residual)}"
                yield case.guess("activation missing", says, residual)


class LeftOut(Hypothesis):
    """B gives back what it is given, and the expected module does not."""

    place = 46

    def guess(self, case: Case) -> Iterator[Guess]:
        if isinstance(case.expected, nn.Identity):
            return
        given = [next((one for one in leaves(call.args) if isinstance(one, Tensor)), None) for call in case.calls]
        if not given or any(one is None for one in given):
            return
        residual = case.gives(given)
        if isinstance(case.found, nn.Identity) or residual == 0:
            what = family(case.expected)
            says = f"B gives what it is given; expected is a {kind_of(case.expected).__name__}"
            yield case.guess(f"{what} missing", says, residual or 0.0)


class AnotherKind(Hypothesis):
    """B has a layer of another class, of which torch says what it is."""

    place = 44

    def guess(self, case: Case) -> Iterator[Guess]:
        one, other = kind_of(case.expected), kind_of(case.found)
        is_torchs = all(kind.__module__.startswith("torch.nn.") for kind in (one, other))
        if (
            one is other
            or not is_torchs
            or issubclass(one, nn.Conv2d)
            or isinstance(case.found, nn.Sequential | nn.Identity)
        ):
            return
        what = family(case.expected)
        says = f"B has a {other.__name__} where a {one.__name__} is expected"
        yield case.guess(f"{what} changed" if what == family(case.found) else "another layer", says)


class AnotherClass(Hypothesis):
    """B has a module of another class, and nothing tells more."""

    place = 200

    def guess(self, case: Case) -> Iterator[Guess]:
        one, other = kind_of(case.expected), kind_of(case.found)
        first = case.expected[0] if isinstance(case.expected, nn.Sequential) else case.expected
        is_folded = isinstance(first, Operator) and not isinstance(case.found, nn.Sequential)  # and B's may be that
        if one is not other and not is_folded and not (issubclass(one, nn.Conv2d) and other is nn.Conv2d):
            says = f"B has a module of the class {other.__name__} where a {one.__name__} is expected"
            yield case.guess("another layer", says)
