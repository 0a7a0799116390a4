"""The geometry of a conv: padding mode, padding, stride, dilation, groups."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surgeon.conv.spec import ConvSpec
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.report import Guess

_KINDS = {
    "padding_mode": "padding mode",
    "pads": "padding amount",
    "stride": "stride",
    "dilation": "dilation",
    "groups": "groups",
}


class Geometry(Hypothesis):
    """The expected kernel with the geometry of B's conv gives what B gives."""

    place = 50

    def guess(self, case: Case) -> Iterator[Guess]:
        if not isinstance(case.expected, nn.Conv2d) or not isinstance(case.found, nn.Conv2d):
            return
        wanted, found = ConvSpec.of(case.expected), ConvSpec.of(case.found)
        other = [name for name in _KINDS if getattr(wanted, name) != getattr(found, name)]
        if not other or case.off:
            return
        is_whole = case.expected.weight.shape == case.found.weight.shape
        residual = case.made_by(found.change(bias=wanted.bias).holding(case.expected)) if is_whole else None
        if residual is None and "groups" not in other:
            return
        said = [f"{_of(found, name)} where {_of(wanted, name)} is expected" for name in other]
        evidence = "" if residual is None else f"; the expected kernel with that gives what B gives {close(residual)}"
        yield case.guess(_KINDS[other[0]], f"B's conv has {', '.join(said)}{evidence}", residual or 0.0)


def _of(spec: ConvSpec, name: str) -> str:
    value = getattr(spec, name)
    if name == "pads":
        return "padding " + (f"({value[0]}, {value[2]})" if value.is_symmetric else str(tuple(value)))
    return f"{name.replace('_', ' ')} {value}"
