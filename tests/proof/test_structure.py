"""What B has that the replay did not make is found although no input that is run shows it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon

FAR, NEAR = 1e9, 1e8  # limits that no input reaches


def limiter(limit: float) -> Callable[[Tensor], Tensor]:
    def limited(x: Tensor) -> Tensor:
        return x.clamp(max=limit)

    return limited


def hook(limit: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def limited(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out.clamp(max=limit)

    return limited


class InSlots:
    __slots__ = ("limit",)

    def __init__(self, limit: float) -> None:
        self.limit = limit


class Called:
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.limit)


MAKE: dict[str, Callable[[float], Any]] = {
    "closure": limiter,
    "partial": lambda limit: functools.partial(torch.clamp, max=limit),
    "method": lambda limit: Called(limit).__call__,
    "object": Called,
    "slots": InSlots,
    "nested": lambda limit: {"a": [{"b": {"c": [{"d": ({"e": limit},)}]}}]},
    "array": lambda limit: np.full(2000, limit),
    "last digit of an array": lambda limit: np.array([1.0, 1 + (limit == NEAR) * 1e-15]),
}


class Limited(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.held(x) if callable(self.held) else x.clamp(max=FAR)


def pair(held: Any = None) -> tuple[nn.Module, Any]:
    a = Limited(held).eval()
    shake_(a)
    return a, surgeon.fuse(a, norms=True, example=(1, 3, 8, 8))


def said(a: nn.Module, b: nn.Module) -> surgeon.Report:
    return surgeon.verify(a, b, (1, 3, 8, 8), prove=True)


@pytest.mark.parametrize("kind", MAKE)
def test_what_a_function_or_an_object_holds_counts(kind: str) -> None:
    a, b = pair(MAKE[kind](FAR))
    assert said(a, b)
    b.held = MAKE[kind](FAR)
    assert said(a, b)
    b.held = MAKE[kind](NEAR)
    report = said(a, b)
    assert [check.name for check in report.checks if not check.passed] == ["structure"]
    assert not report.for_every_input


def test_what_a_hook_holds_counts() -> None:
    a = Limited(None).eval()
    shake_(a)
    a.act.register_forward_hook(hook(FAR))
    b = surgeon.fuse(a, norms=True, example=(1, 3, 8, 8))
    assert said(a, b)
    for one in (hook(FAR), hook(NEAR)):
        b.act._forward_hooks.clear()
        b.act.register_forward_hook(one)
    report = said(a, b)
    check = next(check for check in report.checks if not check.passed)
    assert "has forward hooks that do something else" in check.says


@pytest.mark.parametrize("name", ["act", "conv"])
def test_an_attribute_that_hides_a_module_is_found(name: str) -> None:
    a, b = pair()
    vars(b)[name] = nn.Sequential(b.get_submodule(name), nn.Hardtanh(-NEAR, NEAR)).eval()
    report = said(a, b)
    check = next(check for check in report.checks if not check.passed)
    assert not report.for_every_input
    assert f"has a {name} of its own" in check.says


def test_an_attribute_that_holds_itself_is_compared_once() -> None:
    a, b = pair()
    b.held = a.held = {"limit": FAR}
    a.held["itself"] = a.held
    b = surgeon.fuse(a, norms=True, example=(1, 3, 8, 8))
    assert said(a, b)


def test_where_the_code_of_b_cannot_be_compared_to_the_end_nothing_is_said_of_every_input() -> None:
    report = said(*pair(Called(FAR)))
    assert report
    assert not report.for_every_input
    assert any("cannot be compared with the replay's to the end" in remark for remark in report.remarks)


def test_where_train_mode_departs_equal_for_every_input_is_said_of_eval_mode_alone() -> None:
    a, b = pair()
    report = surgeon.verify(a, b, (2, 3, 8, 8), mode="train", prove=True)
    assert report.verdict == "approximate"
    assert not report.for_every_input
    assert any(remark.startswith("in eval mode A and B are equal for every input") for remark in report.remarks)
