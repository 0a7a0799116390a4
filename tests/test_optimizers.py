"""An optimizer that was made before the convs were swapped, and the line that lets it train what is new."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon
from surgeon.blocks import Block

SHAPE = (4, 8, 12, 12)
SPLIT = {"surgeon": 1, "title": "T", "rules": [{"swap": "acblock", "with": {"init": "split"}}]}
RECIPES = {
    "acnet": "acnet",
    "online": "acnet-online",
    "split": SPLIT,
    "scratch": "acnet-scratch",
    "hetconv": "hetconv-p4",
    "octave": {"surgeon": 1, "title": "T", "rules": [{"swap": "octave", "with": {"min_size": 1}}]},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Make two steps, and name the parameters that have moved: a strip whose γ is 0 moves in the second only."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    for seed in range(2):
        optimizer.zero_grad()
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_line_adds_what_is_new_to_an_optimizer(recipe: str, kind: type[torch.optim.Optimizer]) -> None:
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    old = {id(parameter) for parameter in model.parameters()}
    assert surgeon.convert_(model, RECIPES[recipe], SHAPE) is model
    new = surgeon.new_parameters(model, optimizer)
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in old}
    assert {id(one) for one in new} == {id(p) for name, p in model.named_parameters() if name in names}
    assert bool(new) == (recipe != "octave")  # its blocks hold the parameters of the convs themselves
    assert not trained(model, optimizer) & names
    optimizer.add_param_group({"params": surgeon.new_parameters(model, optimizer)})
    moved = trained(model, optimizer)
    assert names - moved == set()
    assert surgeon.new_parameters(model, optimizer) == []


def test_what_is_frozen_is_not_added() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    surgeon.convert_(model, "acnet", SHAPE)
    frozen = {id(p) for p in model[0].parameters() if not p.requires_grad}
    assert frozen
    assert not frozen & {id(one) for one in surgeon.new_parameters(model, optimizer)}
    assert any(isinstance(module, Block) for module in model.modules())
