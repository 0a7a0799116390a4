"""A forward that asks what no placeholder can answer, and catches that, has no graph that could be trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative, shake_
from torch import Tensor, nn

import surgeon
from surgeon.analysis.islands import capture


def is_true(size: Any) -> bool:
    try:
        return bool(size > 64)
    except Exception:
        return False


def number(size: Any) -> bool:
    with contextlib.suppress(Exception):
        return int(size) > 64
    return False


def real_number(size: Any) -> bool:
    with contextlib.suppress(Exception):
        return float(size) > 64
    return False


def parts(size: Any) -> bool:
    with contextlib.suppress(Exception):
        return len(size) > 64
    return type(size) is int and size > 64


def in_a_mapping(size: Any) -> bool:
    return {80: True}.get(size, False)


class BySize(nn.Module):
    """Leaves a norm out on large maps, if `is_large` says so."""

    def __init__(self, is_large: Callable[[Any], bool]) -> None:
        super().__init__()
        self.conv, self.norm, self.is_large = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), is_large

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if self.is_large(x.shape[2]) else self.norm(y)


@pytest.mark.parametrize("is_large", [is_true, number, real_number, parts, in_a_mapping])
def test_what_depends_on_a_size_is_neither_folded_nor_called_equal_for_every_input(
    is_large: Callable[[Any], bool],
) -> None:
    net = BySize(is_large).eval()
    shake_(net)
    [opaque] = capture(net).opaque
    assert "and goes on where nobody can tell" in opaque.reason
    fused = surgeon.fuse(net, norms=True, example=(1, 3, 16, 16))
    assert not surgeon.verify(net, fused, (1, 3, 16, 16), prove=True).for_every_input
    x = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        assert relative(fused(x), net(x)) < 1e-5


def test_sizes_of_new_tensors_are_asked_for_nothing() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones((x.shape[0], 1, x.shape[2], x.shape[3]))
            found: Tensor = self.conv(x * mask)
            return found

    assert [one.path for one in capture(Masked()).islands] == [""]
