"""The rules, one by one: which steps each matches, and that no step is claimed by two."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

import surgeon
from surgeon.analysis.program import FUNCTIONS, METHODS
from surgeon.blocks.octave import OctaveConv, OctaveConvOptions
from surgeon.blocks.pairs import PairNorm
from surgeon.conv import streams
from surgeon.octave import rules
from surgeon.octave.layout import Layout, Step
from surgeon.octave.rules import concat, elementwise, enlarge, product, rule_of, spatial
from surgeon.octave.rules import sum as sums


def octave(seams: str = "remove") -> OctaveConv:
    return OctaveConv(nn.Conv2d(8, 8, 3, padding=1), OctaveConvOptions.model_validate({"seams": seams}))


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


STEPS: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], str]] = {
    "an octave conv": (octave(), "octave"),
    "an octave conv that keeps its seams": (octave("keep"), "conv"),
    "a conv": (nn.Conv2d(8, 8, 3), "conv"),
    "an ACBlock": (surgeon.convert(nn.Sequential(nn.Conv2d(8, 8, 3)), "acnet")[0], "conv"),
    "a norm": (nn.BatchNorm2d(8), "norm"),
    "a norm of pairs": (PairNorm(8), "norm"),
    "a norm with an activation": (BatchNormAct2d(8), "norm"),
    "a norm with a softmax over channels": (BatchNormAct2d(8, act_layer=nn.Softmax2d, inplace=None), "norm with more"),
    "a frozen norm": (FrozenBatchNorm2d(8), "norm"),
    "a synchronised norm": (nn.SyncBatchNorm(8), "norm"),
    "another norm": (nn.GroupNorm(2, 8), "other"),
    "a ReLU": (nn.ReLU(), "elementwise"),
    "a ReLU with a hook": (hooked(), "other"),
    "a PReLU with one slope": (nn.PReLU(), "elementwise"),
    "a PReLU with a slope for every channel": (nn.PReLU(8), "other"),
    "a function": (F.gelu, "elementwise"),
    "a method": (lambda x: x.clamp(0, 1), "elementwise"),
    "a sum": (lambda x: x + 1, "sum"),
    "a difference in place": (lambda x: x.sub_(1), "sum"),
    "a product": (lambda x: x * 2, "product"),
    "a quotient": (lambda x: torch.div(x, 2), "product"),
    "a concatenation": (lambda x: torch.cat([x, x], 1), "concat"),
    "a pooling": (nn.MaxPool2d(2), "spatial"),
    "a pooling by a function": (lambda x: F.avg_pool2d(x, 2), "spatial"),
    "a mean over pixels": (lambda x: x.mean((2, 3)), "spatial"),
    "a mean over pixels by a function": (lambda x: torch.mean(x, dim=[-1, -2]), "spatial"),
    "a mean over channels": (lambda x: x.mean(1), "other"),
    "a mean of everything": (lambda x: torch.mean(x), "other"),
    "a slice of channels": (lambda x: x[:, 2:4], "select"),
    "a slice of pixels": (lambda x: x[:, :, 2:4], "other"),
    "an image of a batch": (lambda x: x[0], "select"),
    "a split": (lambda x: x.split(4, 1), "split"),
    "chunks by a function": (lambda x: torch.chunk(x, 2, dim=1), "split"),
    "an enlarged map": (nn.Upsample(scale_factor=2), "enlarge"),
    "an enlarged map by a function": (lambda x: F.interpolate(x, scale_factor=(2.0, 3.0)), "enlarge"),
    "an enlarged map of a fixed size": (lambda x: F.interpolate(x, 8), "other"),
    "a map enlarged by half": (nn.Upsample(scale_factor=1.5), "other"),
    "a smoothly enlarged map": (nn.Upsample(scale_factor=2, mode="bilinear"), "other"),
    "a height": (lambda x: x.size(-2), "shape"),
    "a number of channels": (lambda x: x.size(1), "other"),
    "height and width": (lambda x: x.shape[-2:], "shape"),
    "a whole shape": (lambda x: x.shape, "other"),
    "a shape with the channels": (lambda x: x.shape[:2], "other"),
    "a dtype": (lambda x: x.dtype, "shape"),
    "a low-pass": (lambda x: streams.low_pass(x, [[4, 8]]), "low_pass"),
    "a flip": (lambda x: x.flip(-1), "other"),
    "a power": (lambda x: operator.pow(x, 2), "other"),
}


class Does(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return path == "step"


def step_of(does: nn.Module | Callable[[Tensor], Tensor]) -> Step:
    """The step of a graph that has one, between its input and its output."""
    module = Does(does)
    if does is STEPS["a low-pass"][0]:
        graph = fx.Graph()
        graph.output(graph.call_function(streams.low_pass, (graph.placeholder("x"), [[4, 8]])))
    else:
        graph = Tracer().trace(module)
    return Step(list(graph.nodes)[1], dict(module.named_modules()))


@pytest.mark.parametrize("what", STEPS)
def test_a_step_has_one_rule_or_none(what: str) -> None:
    does, expected = STEPS[what]
    step = step_of(does)
    assert rule_of(step).name == expected
    matching = [rule.name for rule in rules.rules() if rule.matches(step)]
    assert len(matching) == (0 if expected == "other" and not step.is_customised else 1)


def test_every_rule_is_found_in_the_folder_and_matched_here() -> None:
    names = [rule.name for rule in rules.rules()]
    assert len(set(names)) == len(names)
    assert {*names, "other"} == {*(expected for _, expected in STEPS.values()), "input"}


def test_streams_go_through_a_step_exactly_if_they_come_out_of_it() -> None:
    """A rule that does not carry streams writes no low channels, but for a conv, which makes them itself."""
    for rule in rules.rules():
        if rule.carries or rule.name in ("octave", "shape"):
            assert type(rule).rewrite is not rules.StreamRule.rewrite
        else:
            assert type(rule).rewrite is rules.StreamRule.rewrite


@pytest.mark.parametrize("module", [elementwise, sums, product, concat, spatial, enlarge], ids=lambda one: one.__name__)
def test_no_rule_asks_for_a_step_that_no_stored_graph_may_hold(module: object) -> None:
    known = set(map(id, FUNCTIONS.values()))
    assert not {one.__name__ for one in getattr(module, "FUNCTIONS", ()) if id(one) not in known}
    assert set(getattr(module, "METHODS", ())) <= METHODS


def test_low_channels_of_a_concatenation_lie_where_they_come_to_lie() -> None:
    step = step_of(lambda x: torch.cat([x, x], 1))
    source = step.node.all_input_nodes[0]
    rule = rule_of(step)
    assert rule.flow(step, {source: Layout(8, ((4, 8),))}).layout == Layout(16, ((4, 8), (12, 16)))
    assert "is not known" in str(rule.flow(step, {source: Layout(None, ((4, 8),))}).seam)
