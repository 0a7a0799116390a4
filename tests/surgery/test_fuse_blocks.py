"""A block that is not what its settings say is no bug of surgeon, and is not folded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import PlanError


def test_a_block_whose_parts_were_changed_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    converted = surgeon.convert(net, "acnet-scratch", (1, 3, 16, 16))
    converted[2].square_conv.padding_mode = "circular"
    converted[2].square_conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with pytest.raises(PlanError, match="square_conv is not the conv that belongs there"):
        surgeon.fuse(converted)
    assert isinstance(converted[2], surgeon.ACBlock)
