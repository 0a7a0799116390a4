"""fuse: what it refuses to fold, and that nothing has happened then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import shake_
from tiny import SHAPE, ConvNorm
from torch import nn
from torch.nn.utils import prune

import surgeon
from surgeon.analysis.network import Network
from surgeon.errors import ModelError, PassError, PlanError
from surgeon.surgery.fuse import fold_all_
from surgeon.surgery.look import inputs_for


def _converted() -> nn.Module:
    torch.manual_seed(0)
    return surgeon.convert(shake_(nn.Sequential(ConvNorm(), ConvNorm())).eval(), "acnet", SHAPE)


def _group_norm(block: surgeon.ACBlock) -> None:
    block.ver_bn = nn.GroupNorm(2, 4)


def _no_statistics(block: surgeon.ACBlock) -> None:
    block.hor_bn = nn.BatchNorm2d(4, track_running_stats=False)


def _hook(block: surgeon.ACBlock) -> None:
    block.register_forward_hook(lambda *_: None)


def _inner_hook(block: surgeon.ACBlock) -> None:
    prune.random_unstructured(block.square_conv, "weight", 0.5)


def _own_forward(block: surgeon.ACBlock) -> None:
    block.ver_conv.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_group_norm, "1.conv cannot be folded: ver_bn is a GroupNorm now"),
        (_no_statistics, "1.conv cannot be folded: hor_bn keeps no running statistics"),
        (_hook, "1.conv cannot be folded: hooks are attached to it"),
        (_inner_hook, "1.conv cannot be folded: hooks are attached to its square_conv"),
        (_own_forward, "1.conv cannot be folded: its ver_conv has a forward of its own"),
    ],
)
def test_a_block_that_is_no_longer_what_it_was_is_not_folded(change: Callable[..., None], says: str) -> None:
    model = _converted()
    change(model[1].conv)
    with pytest.raises(PlanError, match=says):
        surgeon.fuse_(model)
    assert all(isinstance(part.conv, surgeon.ACBlock) for part in model)


def test_a_bare_block_folds_itself() -> None:
    block = _converted()[0].conv
    with pytest.raises(PlanError, match=r"call its fold\(\) to make the conv"):
        surgeon.fuse_(block)


def test_a_fold_that_moves_the_output_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _converted()
    fold = surgeon.ACBlock.fold
    inputs = inputs_for(model, SHAPE)
    assert fold_all_(Network(_converted(), inputs)).distance < 1e-5
    monkeypatch.setattr(surgeon.ACBlock, "fold", lambda block: fold(block).requires_grad_(False).apply(_doubled))
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(PassError, match="before its blocks were folded"):
        fold_all_(Network(model, inputs))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    monkeypatch.undo()
    assert fold_all_(Network(model, inputs)).distance < 1e-5


def _doubled(conv: nn.Module) -> None:
    conv.weight.mul_(2)


@pytest.mark.parametrize("function", [surgeon.fuse, surgeon.fuse_, surgeon.survey])
def test_a_file_name_is_no_model(function: Callable[..., object]) -> None:
    with pytest.raises(ModelError, match=r"a str is not a model. surgeon.load\('r18.pt'\) opens a file"):
        function("r18.pt")
    with pytest.raises(ModelError, match="a str is not a model"):
        surgeon.convert("r18.pt", "acnet")
    with pytest.raises(ModelError, match=r"a list is not a model\. Give an nn.Module"):
        surgeon.verify([], ConvNorm(), SHAPE)
    assert issubclass(ModelError, surgeon.SurgeonError)
