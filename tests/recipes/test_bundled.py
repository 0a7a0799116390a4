"""The bundled recipes on small networks of the kind that each is for: what they swap and leave, and what that saves."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import segmentation_models_pytorch
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

import surgeon
from surgeon.recipes import recipe as recipes

SHAPE = (1, 3, 96, 96)


@functools.cache
def _mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(width_mult=0.5).eval()


@functools.cache
def _convnext() -> nn.Module:
    return timm.create_model("test_convnext").eval()


@functools.cache
def _detector() -> nn.Module:
    options = {"norm_layer": FrozenBatchNorm2d, "trainable_layers": 5}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **options)
    return RetinaNet(backbone, 3, min_size=96, max_size=96).eval()


@functools.cache
def _unet() -> nn.Module:
    unet: nn.Module = segmentation_models_pytorch.Unet(
        "resnet18", encoder_weights=None, decoder_channels=(32, 32, 16, 16, 16)
    )
    return unet.eval()


def _plan(model: nn.Module, recipe: str) -> surgeon.Plan:
    is_detector = isinstance(model, RetinaNet)
    return surgeon.plan(model, recipe, ([torch.rand(3, 96, 96)],) if is_detector else SHAPE)


def _saves(plan: surgeon.Plan) -> float:
    macs = plan.gained.macs
    assert macs is not None
    return macs.after / macs.before


def _skips(plan: surgeon.Plan) -> set[str]:
    return {entry.skip for entry in plan.convs if entry.skip}


def test_acnet_depthwise_takes_every_depthwise_conv_and_nothing_else() -> None:
    plan = _plan(_mobilenet(), "acnet-depthwise")
    depthwise = {name for name, m in _mobilenet().named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert {entry.path for entry in plan.swaps} == depthwise
    assert all(entry.takes_norm for entry in plan.swaps)
    assert _skips(plan) == {"no rule claims it"}
    assert plan.gained.macs == surgeon.plan(_mobilenet(), "acnet", SHAPE).gained.macs  # nothing is added
    assert plan.total.macs is not None
    assert plan.total.macs.after < 1.1 * plan.total.macs.before


def test_acnet_depthwise_takes_the_large_kernels_of_convnext() -> None:
    plan = _plan(_convnext(), "acnet-depthwise")
    kernels = Counter(entry.spec.kernel for entry in plan.swaps if not isinstance(entry.spec, str))
    assert set(kernels) == {(7, 7)}
    assert {entry.path for entry in plan.swaps} == {
        name for name, m in _convnext().named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    }


def test_octave_mobile_saves_and_keeps_three_eighths_low() -> None:
    plan = surgeon.plan(_mobilenet(), "octave-mobile", (1, 3, 224, 224))
    assert {entry.options["alpha"] for entry in plan.swaps} == {0.375}
    assert any(entry.rule and entry.rule.startswith("rules[1]") for entry in plan.swaps)  # depthwise convs
    assert _saves(plan) < 0.8
    with pytest.raises(surgeon.errors.PlanError, match="claims no conv"):
        _plan(_unet(), "octave-mobile")  # which has no depthwise convs


def test_octave_quarter_saves_less_than_octave() -> None:
    quarter, half = (_plan(_unet(), recipe) for recipe in ("octave-quarter", "octave"))
    assert {entry.options["alpha"] for entry in quarter.swaps} == {0.25}
    assert _saves(half) < _saves(quarter) < 0.95


def test_backbone_recipes_leave_the_pyramid_and_the_heads_of_a_detector() -> None:
    acnet, octave = (_plan(_detector(), recipe) for recipe in ("acnet-backbone", "octave-backbone"))
    for plan in (acnet, octave):
        assert plan.swaps
        assert all(entry.path.startswith("backbone.body.") for entry in plan.swaps)
    assert all(entry.takes_norm and entry.note is None for entry in acnet.swaps)  # frozen ones: exact in training, too
    assert len(acnet.swaps) == 16
    assert _skips(acnet) == {"no rule claims it", "the feature pyramid has no norms"}
    assert _saves(octave) < 1
    everywhere = _plan(_detector(), "acnet")
    assert any(entry.note for entry in everywhere.swaps)  # what the recipe avoids: heads, which have no norms


def test_backbone_recipes_take_the_encoder_of_a_unet() -> None:
    for recipe in ("acnet-backbone", "octave-backbone"):
        plan = _plan(_unet(), recipe)
        assert plan.swaps
        assert all(entry.path.startswith("encoder.") for entry in plan.swaps)


def test_hetconv_decoder_takes_the_whole_decoder_and_leaves_the_encoder() -> None:
    plan = _plan(_unet(), "hetconv-decoder")
    decoder = {name for name, m in _unet().named_modules() if isinstance(m, nn.Conv2d) and name.startswith("decoder.")}
    assert {entry.path for entry in plan.swaps} == decoder
    assert _skips(plan) == {"no rule claims it"}
    assert _saves(plan) < 0.95


@pytest.mark.parametrize(
    ("names", "recipe"),
    [
        (("backbone.body.layer1.0.conv1", "backbone.layer1.0.conv1", "encoder.layer1.0.conv2"), "acnet-backbone"),
        (("decoder.blocks.0.conv1.0", "decode_head.convs.0.conv", "classifier.0", "up1.conv.0"), "hetconv-decoder"),
    ],
)
def test_the_names_of_several_libraries_are_known(names: tuple[str, ...], recipe: str) -> None:
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        here = model
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = here.get_submodule(parent)
        here.add_module(last, nn.Conv2d(8, 8, 3))
    surveyed = surgeon.survey(model)
    rules = [rule for rule in recipes.load(recipe).rules if rule.swap]
    claimed = {
        entry.path for entry in surgeon.plan(model, recipe).convs if entry.rule and entry.rule in map(str, rules)
    }
    assert claimed == set(names) == {site.path for site in surveyed.sites}


def test_every_bundled_recipe_says_what_it_brings() -> None:
    for name, file in recipes.bundled().items():
        comment = file.read_text(encoding="utf-8").partition("\nsurgeon:")[0]
        assert all(line.startswith("# ") for line in comment.splitlines()), name
        assert "arXiv:" in comment, name
