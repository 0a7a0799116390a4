"""Around a fit: nothing of another network is taken over, nothing trained is lost, nothing is made worse."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import DataError, FitError, StoreError
from surgeon.fitting import fitted as fits
from surgeon.fitting.distil import Distilled
from surgeon.fitting.identity import network_hash
from surgeon.fitting.measure import Worth

HETCONV = {"surgeon": 1, "rules": [{"swap": "hetconv", "with": {"p": 2}, "match": {"in_channels": {"min": 8}}}]}
LEAST = {"surgeon": 1, "rules": [{"swap": "octave", "with": {"alpha": 0.5, "low": "least", "min_size": 2}}]}
SHAPE = (1, 3, 16, 16)


class Net(nn.Module):
    """Two convs with norms, and an activation that no tensor tells."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act = activation or nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _net(activation: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    net = Net(activation)
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.eval()


def _images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _numbers(model: nn.Module) -> list[Tensor]:
    return [one.clone() for one in (*model.parameters(), *model.buffers())]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_network_whose_channels_were_permuted_is_as_it_was_after_an_error() -> None:
    model = surgeon.convert(_net(), LEAST, SHAPE)
    before = _numbers(model)

    def stop(what: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgeon.fit_(model, _net(), _images(), progress=stop)
    assert _same(before, _numbers(model))
    with pytest.raises(DataError, match="pixels say too little"):
        surgeon.fit_(surgeon.convert(_net(), HETCONV, SHAPE), _net(), torch.randn(1, 3, 2, 2))


def test_a_state_of_a_network_with_other_code_is_refused(tmp_path: Path) -> None:
    one, other = _net(), _net(nn.GELU())
    surgeon.fit(surgeon.convert(one, HETCONV, SHAPE), one, _images(), resume=tmp_path / "state")
    with pytest.raises(StoreError, match="with other networks"):
        surgeon.fit(surgeon.convert(other, HETCONV, SHAPE), other, _images(), resume=tmp_path / "state")


class Head(nn.Module):
    """Gives one of two outputs."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.which]


def test_networks_are_told_apart_by_classes_and_plain_attributes() -> None:
    assert network_hash(Head(0)) == network_hash(Head(0))
    assert network_hash(Head(0)) != network_hash(Head(1))
    assert network_hash(_net()) == network_hash(_net())
    assert network_hash(_net()) != network_hash(_net(nn.GELU()))
    assert network_hash(_net().train()) == network_hash(_net())


def test_what_was_trained_is_not_taken_away() -> None:
    net = _net()
    model = surgeon.convert(net, HETCONV, SHAPE)
    with torch.no_grad():
        model.fc.weight.add_(0.01)
    before = _numbers(model)
    with pytest.raises(FitError, match="was trained after it was converted"):
        surgeon.fit_(model, net, _images())
    assert _same(before, _numbers(model))


def test_a_distilled_network_that_is_further_off_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(converted: nn.Module, *_: object, **__: object) -> Distilled:
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.mul_(-1)
        return Distilled(3, 3, 1.0, 0.5, 8, 2, (), 0.1, "images as they are", True, False)

    net = _net()
    plain = surgeon.fit(surgeon.convert(net, HETCONV, SHAPE), net, _images())
    monkeypatch.setattr(fits, "distil_", spoil)
    found = surgeon.fit(surgeon.convert(net, HETCONV, SHAPE), net, _images(), distil=3)
    assert _same(_numbers(plain), _numbers(found))
    measured = surgeon.history(found)[-1].measured
    assert measured["distilled"]["kept"] is False
    assert measured["network"]["distilled"]["relative_l2"] > measured["network"]["fitted"]["relative_l2"]


def test_that_the_network_has_come_no_nearer_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fits._is_further(Worth(4, 4, 2), Worth(4, 4, 3))
    assert not fits._is_further(Worth(4, 4, 3), Worth(4, 4, 3))
    net = _net()
    with caplog.at_level(logging.WARNING, "surgeon"):
        surgeon.fit(surgeon.convert(net, HETCONV, SHAPE), net, _images())
    assert "nearer" not in caplog.text
    monkeypatch.setattr(fits, "_is_further", lambda one, other: True)
    surgeon.fit(surgeon.convert(net, HETCONV, SHAPE), net, _images())
    assert "has not brought the network nearer" in caplog.text


class Functional(nn.Module):
    """A conv that is a function of parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.weight = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(self.conv1(x).relu(), self.weight, padding=1)


def test_a_budget_may_swap_a_conv_that_is_a_function() -> None:
    model = Functional().eval()
    plan = surgeon.plan(model, HETCONV, data=_images(), budget="macs=0.9")
    assert plan.budget is not None
    assert plan.gained.macs is not None
    assert plan.gained.macs.after <= 0.9 * plan.gained.macs.before
    recipe = {"surgeon": 1, "rules": [{"swap": "octave", "with": {"min_size": 2}}]}
    assert surgeon.plan(model, recipe, data=_images(), budget="macs=0.9").swaps


def test_images_say_how_large_the_input_is() -> None:
    assert surgeon.plan(_net(), HETCONV, data=_images(), budget="macs=0.9").input == (SHAPE,)
    converted = surgeon.convert(_net(), HETCONV, data=surgeon.images(_images(), batch=16))
    assert surgeon.history(converted)[0].plan["input"] == [list(SHAPE)]


def test_layers_about_which_the_images_say_too_little_are_named() -> None:
    net = _net()
    found = surgeon.fit(surgeon.convert(net, HETCONV, SHAPE), net, _images(12))
    assert surgeon.history(found)[-1].measured["not_fitted"] == ["fc"]
    assert "not_fitted" not in surgeon.history(surgeon.convert(net, HETCONV, data=_images()))[-1].measured
