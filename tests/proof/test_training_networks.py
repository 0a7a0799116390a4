"""verify in train mode, and of gradients, on networks of ten kinds: right pairs pass, a gradient 1e-6 off does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import shake_
from nets.small_networks import small_densenet
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, ResNet

import surgeon

MODELS: Any = torchvision.models
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 32),
    "vgg": (lambda: MODELS.vgg11_bn().features[:15], 32),
    "mobilenet": (lambda: MODELS.mobilenet_v2(width_mult=0.1, num_classes=10, dropout=0.3), 32),
    "densenet": (small_densenet, 32),
    "regnet": (lambda: RegNet(BlockParams.from_init_params(2, 8, 8.0, 2.5, 8), num_classes=10), 32),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", drop_rate=0.3), 32),
    "convnext": (lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), drop_path_rate=0.3), 32),
    "shufflenet": (lambda: MODELS.ShuffleNetV2([1, 1, 1], [24, 16, 32, 64, 64], num_classes=10), 32),
    "googlenet": (lambda: MODELS.googlenet(num_classes=10, init_weights=False), 32),  # gives three outputs in training
    "lraspp": (lambda: MODELS.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3), 32),
}
# What is made of each, and whether that is meant to keep what it computes in train mode.
PAIRS = [
    ("resnet", "acblock", {"init": "takeover"}, True),
    ("resnet", "hetconv", {"p": 2}, False),
    ("vgg", "repvgg", {"init": "takeover"}, True),
    ("vgg", "dbb", {"init": "split"}, False),
    ("mobilenet", "acblock", {"init": "split", "form": "online"}, True),
    ("mobilenet", "repvgg", {"init": "scratch"}, False),
    ("densenet", "acblock", {"init": "takeover"}, False),  # its norms stand in front of the convs
    ("densenet", "dbb", {"init": "takeover", "form": "online"}, True),
    ("regnet", "dbb", {"init": "takeover"}, True),
    ("regnet", "acblock", {"init": "split"}, False),
    ("mobilenetv3", "acblock", {"placement": "border"}, True),
    ("mobilenetv3", "repvgg", {"init": "split"}, False),
    ("convnext", "repvgg", {"init": "takeover"}, False),  # it has no batch norms
    ("convnext", "repvgg", {"init": "split", "form": "online"}, True),
    ("shufflenet", "repvgg", {"init": "takeover"}, True),
    ("shufflenet", "dbb", {"init": "scratch"}, False),
    ("googlenet", "acblock", {"init": "takeover"}, True),
    ("lraspp", "octave", {}, False),
]
FAULTY = ("resnet", "densenet", "regnet", "convnext", "shufflenet")  # small enough to be verified again with a fault
TRAIN: dict[str, Any] = {"mode": "train", "gradients": True}


def _scale(module: nn.Module, given: Any, back: Any) -> Any:
    return tuple(None if one is None else one * (1 + 1e-6) for one in given)


@pytest.mark.parametrize(("name", "block", "options", "keeps"), PAIRS, ids=lambda one: str(one))
def test_train_mode_and_gradients(name: str, block: str, options: dict[str, Any], keeps: bool) -> None:
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    a, shape = shake_(make(), gently=True), (3, 3, side, side)
    rule = {"swap": block, "match": {"kernel": {"min": 3}}, "with": options}
    b = surgeon.convert(a, {"surgeon": 1, "rules": [rule]}, shape)
    report = surgeon.verify(a, b, shape, **TRAIN)
    assert report.verdict == ("equivalent" if keeps else "approximate"), report
    assert all(one.passed for one in report.tensors)
    assert {"output", "gradient"} <= {one.kind for one in report.tensors}
    if name in FAULTY:
        head = [one for one in b.modules() if isinstance(one, nn.Conv2d | nn.Linear)][-1]
        head.register_full_backward_hook(_scale)
        found = surgeon.verify(a, b, shape, **TRAIN)
        assert found.verdict == "different"
        assert "gradients" in {check.name for check in found.checks if not check.passed}
