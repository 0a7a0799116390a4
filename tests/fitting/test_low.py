"""Which channels become low, chosen by images."""

from __future__ import annotations

import torch
from torch import nn

import surgeon
from surgeon.analysis.network import Network
from surgeon.fitting import data as images
from surgeon.fitting import low
from surgeon.recipes import recipe as recipes

RECIPE = {"surgeon": 1, "rules": [{"swap": "octave", "with": {"alpha": 0.5, "low": "least"}}]}


def _network() -> nn.Sequential:
    """Channels 0 and 1 of the map between the convs are smooth on smooth images, the others are edges."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    )
    kernel = torch.zeros(4, 1, 3, 3)
    kernel[:2] = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1) / 9
    kernel[2:, 0, 1, 1], kernel[2:, 0, 1, 0] = torch.tensor([40.0, 30.0]), torch.tensor([-40.0, -30.0])
    with torch.no_grad():
        model[0].weight.copy_(kernel)
    return model.eval()


def _noise(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_losses_are_what_pooling_takes_away_in_units_of_the_norm_behind() -> None:
    model, x = _network(), _noise()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        model[1].running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
        y = model[0](x).double()
    pooled = nn.functional.avg_pool2d(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    norm = model[1]
    scale = norm.weight.double().square() / (norm.running_var.double() + norm.eps)
    expected = (y - pooled).square().mean((0, 2, 3)) * scale
    found = low.losses(Network(model, surgeon.Inputs((x[:1],))), images.of(x, batch=5))["0"]
    assert torch.allclose(found, expected.detach(), rtol=1e-6)


def test_images_decide_which_channels_become_low_and_the_fit_follows_the_order() -> None:
    model, x = _network(), _noise(32)
    given = surgeon.convert(model, RECIPE, (1, 1, 16, 16), data=x)
    permuted = surgeon.history(given)[0].plan["permuted"]
    assert sorted(permuted[0]["order"][2:]) == [0, 1]  # the two smooth ones come last, where channels are low
    assert [step.operation for step in surgeon.history(given)] == ["convert", "fit"]
    figures = surgeon.history(given)[1].measured["network"]
    assert figures["fitted"]["relative_l2"] < figures["converted"]["relative_l2"]


def test_images_are_asked_only_where_the_recipe_asks_for_the_least() -> None:
    network = Network(_network(), surgeon.Inputs((_noise(1),)))
    last = recipes.from_dict({"surgeon": 1, "rules": [{"swap": "octave", "with": {"alpha": 0.5}}]})
    assert low.scores(last, network, images.of(_noise())) is None
    assert low.scores(recipes.from_dict(RECIPE), network, None) is None
    assert low.scores(recipes.from_dict(RECIPE), network, images.of(_noise())) is not None
