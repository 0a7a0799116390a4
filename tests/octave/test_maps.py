"""Which convs share a share of low channels, and which maps a conv reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgeon.analysis import sites
from surgeon.api import network_for
from surgeon.blocks import Wanted, registry
from surgeon.octave.maps import Maps, maps_of


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Branches(nn.Module):
    """A sum of two maps, a concatenation of two, and a conv that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 8), conv(8, 8), conv(8, 8)
        self.up, self.down, self.last, self.end = conv(8, 8), conv(8, 12), conv(20, 8), conv(8, 8)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.norm(self.left(x)) + self.right(x))
        x = torch.cat([self.up(x), self.down(x)], 1)
        end: Tensor = self.end(torch.relu(self.last(x)))
        return end


def found(net: nn.Module, **options: object) -> Maps:
    block = registry()["octave"]
    survey = sites.survey(network_for(net, torch.zeros(1, 3, 16, 16)))
    given = Wanted(block, block.Options.model_validate({"alpha": 0.5, "min_size": 2, **options}))
    return maps_of(survey, {site.path: given for site in survey.sites if site.path != "stem"})


def test_maps_that_are_added_are_one_kind_and_those_side_by_side_are_two() -> None:
    maps = found(Branches())
    assert maps.writers == (("left", "right"), ("up",), ("down",), ("last",))
    assert maps.reads == {"up": (0,), "down": (0,), "last": (1, 2), "end": (3,)}


def test_a_conv_that_splits_and_joins_by_itself_has_a_kind_to_itself() -> None:
    maps = found(Branches(), seams="keep")
    assert maps.writers == tuple((path,) for path in ("left", "right", "up", "down", "last", "end"))
    assert not maps.reads
