"""What takes long tells how far it is: from 0 towards 1, never back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import shake_
from torch import nn

import surgeon

SHAPE = (1, 3, 16, 16)
NET = shake_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval(), 1)
CONVERTED = surgeon.convert(NET, "acnet", SHAPE)
WORK: dict[str, Callable[..., object]] = {
    "survey": lambda **how: surgeon.survey(NET, SHAPE, **how),
    "plan": lambda **how: surgeon.plan(NET, "acnet", SHAPE, **how),
    "convert": lambda **how: surgeon.convert(NET, "acnet", SHAPE, **how),
    "fuse": lambda **how: surgeon.fuse(CONVERTED, **how),
    "verify": lambda **how: surgeon.verify(NET, CONVERTED, SHAPE, **how),
}


@pytest.mark.parametrize("what", WORK)
def test_progress_begins_at_nothing_and_never_goes_back(what: str) -> None:
    told: list[tuple[str, float]] = []
    WORK[what](progress=lambda words, share: told.append((words, share)))
    words, shares = zip(*told, strict=True)
    assert shares[0] == 0
    assert list(shares) == sorted(shares)
    assert 0.3 < shares[-1] <= 1
    assert all(words)


def test_what_is_raised_by_a_progress_stops_the_work_and_leaves_the_model_as_it_was() -> None:
    told: list[str] = []
    surgeon.convert(NET, "acnet", SHAPE, progress=lambda words, share: told.append(words))
    before = {key: value.clone() for key, value in NET.state_dict().items()}
    assert len(told) > 5
    for i in range(len(told)):
        calls = itertools.count()

        def stop(words: str, share: float, calls: Iterator[int] = calls, last: int = i) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            surgeon.convert_(NET, "acnet", SHAPE, progress=stop)
        assert type(NET[0]) is nn.Conv2d, told[i]
        assert all(torch.equal(NET.state_dict()[key], value) for key, value in before.items())
