"""Which feature maps of two networks are compared, also where one of them has two streams there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.app.demo.net import SmallResNet
from surgeon.conv import streams
from surgeon.fitting import stages
from surgeon.fitting.compare import Compared
from surgeon.models.call import Inputs
from tests.helpers import relative, shake_

OCTAVE = {
    "surgeon": 1,
    "title": "all convs but the stem",
    "rules": [
        {"leave": "the stem", "match": {"name": "conv1"}},
        {"swap": "octave", "match": {}, "with": {"alpha": 0.5}},
    ],
}


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = shake_(SmallResNet(4), gently=True).eval()
    return surgeon.convert(original, OCTAVE, example=(2, 1, 24, 24)), original


def _inputs(count: int = 3) -> Inputs:
    return Inputs((torch.randn(count, 1, 24, 24, generator=torch.Generator().manual_seed(0)),))


def test_stages_are_the_last_maps_before_the_resolution_changes() -> None:
    _, original = _pair()
    found = stages.find(original, original, _inputs())
    assert [stage.path for stage in found] == ["layer1", "layer2", "layer3", "avgpool"]


def test_streams_of_a_module_that_is_called_for_each_are_compared_with_their_channels() -> None:
    converted, original = _pair()
    found = stages.find(converted, original, _inputs())
    first = found[0]
    assert first == stages.Stage(("layer1.0.relu", 1), (("layer1.0.relu", 2), ("layer1.0.relu", 3)), low=((2, 4),))
    given = _inputs()
    with Compared(converted, original, found) as compared, torch.no_grad():
        compared.loss(given)
        high, low = (compared.after.found[call][0] for call in first.after)
        target = compared.before.found[first.before][0]
        joined = streams.join(high, low, first.low)
        best = streams.join(*streams.split(target, first.low), first.low)
        measured = stages.loss(first, compared.before, compared.after)
    assert float(measured) == pytest.approx(relative(joined, best) ** 2, rel=1e-5)
    assert float(measured) > 1e-3


def test_every_stage_of_a_network_against_itself_is_zero() -> None:
    _, original = _pair()
    found = stages.find(original, original, _inputs())
    with Compared(original, original, found) as compared, torch.no_grad():
        compared.loss(_inputs())
        assert [float(stages.loss(stage, compared.before, compared.after)) for stage in found] == [0] * 4


class InPlace(nn.Module):
    """Writes into what its modules return, and calls one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        kept = self.pool(x)
        x.mul_(0)
        return self.pool(self.conv(kept) + x.mean()).sum((2, 3))


def test_maps_are_kept_as_they_were_returned_call_by_call() -> None:
    net = InPlace().eval()
    found = stages.find(net, net, _inputs())
    assert [stage.before for stage in found] == [("conv", 0), ("conv", 1), ("pool", 1)]
    with Compared(net, net, found) as compared, torch.no_grad():
        compared.loss(_inputs())
        assert compared.before.found["conv", 0][0].abs().sum() > 0


def test_a_map_of_zeros_divides_by_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()).eval()
    nn.init.constant_(net[0].bias, -100.0)
    found = stages.find(net, net, _inputs())
    with Compared(net, net, found) as compared:
        assert compared.loss(_inputs()).isfinite()


@pytest.mark.parametrize("are_probabilities", [False, True])
def test_scores_are_compared_by_their_divergence(are_probabilities: bool) -> None:
    class Head(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([shift, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            scores = x.flatten(1)[:, :3] + self.shift
            return scores.softmax(1) if are_probabilities else scores

    with Compared(Head(1.0), Head(0.0), []) as compared, torch.no_grad():
        scores = _inputs().args[0].flatten(1)[:, :3] / 2
        p, q = scores.softmax(1), (scores + torch.tensor([0.5, 0.0, 0.0])).softmax(1)
        expected = 4 * (p * (p / q).log()).sum(1).mean()
        assert float(compared.loss(_inputs())) == pytest.approx(float(expected), rel=1e-4)
