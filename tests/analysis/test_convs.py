"""Subclasses of Conv2d: what they compute is found by watching them, and they come back as what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from helpers import relative, run_surgeon, shake_
from segmentation_models_pytorch.encoders import _efficientnet as smp
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis import convs
from surgeon.blocks import contract, registry
from surgeon.conv.padding import PaddedConv2d
from surgeon.conv.spec import ConvSpec
from surgeon.errors import PlanError
from surgeon.nn import ACBlock

SIZES = [(2, 3, 16, 17), (2, 3, 17, 16), (2, 3, 15, 18), (2, 3, 21, 21)]


class Reads(nn.Conv2d):
    """Convolves what `before` makes of its input, with what `kernel` makes of its weight, and then does `behind`."""

    def before(self, x: Tensor) -> Tensor:
        return x

    def kernel(self, weight: Tensor) -> Tensor:
        return weight

    def behind(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input: Tensor) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        return self.behind(F.conv2d(self.before(input), self.kernel(self.weight), self.bias, *how))


def doing(**methods: Callable[..., Tensor]) -> Callable[[], nn.Conv2d]:
    return lambda: type("Doing", (Reads,), methods)(4, 4, 3, padding=1)


class Reversing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class Unbiased(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


def counting(self: nn.Conv2d, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return x


def by_area(self: nn.Conv2d, x: Tensor) -> Tensor:
    return F.pad(x, (0, x.shape[-1] % 3, 0, 0))


READ = {
    "adds nothing": (lambda: tiny.NamedConv(4, 8, 3, padding=2), ConvSpec(4, 8, (3, 3), padding=(2, 2))),
    "timm's SAME": (lambda: Conv2dSame(4, 8, 3, stride=2), ConvSpec(4, 8, (3, 3), (2, 2), pads_input="same")),
    "SAME that is symmetric": (lambda: Conv2dSame(4, 8, 5, dilation=2), ConvSpec(4, 8, (5, 5), (1, 1), (4, 4), (2, 2))),
    "SAME of a 1×1 kernel": (lambda: Conv2dSame(4, 8, 1, stride=2), ConvSpec(4, 8, (1, 1), (2, 2))),
    "dynamic, by another package": (
        lambda: smp.Conv2dDynamicSamePadding(4, 8, 5, 2),
        ConvSpec(4, 8, (5, 5), (2, 2), pads_input="same"),
    ),
    "made for one size": (
        lambda: smp.Conv2dStaticSamePadding(4, 8, 3, 2, image_size=224),
        ConvSpec(4, 8, (3, 3), (2, 2), pads_input=(0, 1, 0, 1)),
    ),
    "made for one size, symmetric": (
        lambda: smp.Conv2dStaticSamePadding(4, 8, 3, 2, image_size=225),
        ConvSpec(4, 8, (3, 3), (2, 2), (1, 1)),
    ),
    "pads twice": (
        doing(before=lambda self, x: F.pad(F.pad(x, (0, 1, 0, 0)), (1, 1, 0, 2))),
        ConvSpec(4, 4, (3, 3), pads_input=(1, 3, 2, 3)),
    ),
    "says what it does": (doing(before=lambda self, x: x), ConvSpec(4, 4, (3, 3), padding=(1, 1))),
}
KEPT = {
    "weight-standardised": (lambda: StdConv2d(4, 4, 3), "computes its kernel from its weight at every call"),
    "scaled too": (lambda: ScaledStdConv2d(4, 4, 3), "computes its kernel from its weight at every call"),
    "a scaled kernel": (doing(kernel=lambda self, w: w * 2), "computes its kernel from its weight"),
    "a kernel without gradient": (doing(kernel=lambda self, w: w.detach()), "computes its kernel"),
    "leaves its bias out": (lambda: Unbiased(4, 4, 3), "other tensors than its weight and bias"),
    "an activation behind": (doing(behind=lambda self, x: x.relu()), "does something to the result"),
    "in place": (doing(behind=lambda self, x: x.relu_()), "does something to the result"),
    "a part of the result": (doing(behind=lambda self, x: x[..., 1:]), "does something to the result"),
    "an activation before": (doing(before=lambda self, x: x.relu()), r"more than to pad and to convolve \(relu"),
    "pads with ones": (doing(before=lambda self, x: F.pad(x, (1, 1), value=1.0)), "something else than zeros"),
    "crops": (doing(before=lambda self, x: F.pad(x, (-1, 0, 0, 0))), "something else than its input, or with"),
    "reflects": (doing(before=lambda self, x: F.pad(x, (1, 1, 1, 1), "reflect")), "more than to pad .*reflection"),
    "pads by a rule of its own": (doing(before=by_area), "by a rule that surgeon does not know"),
    "in training only": (doing(before=lambda self, x: x * 2 if self.training else x), "more than to pad"),
    "at large sizes only": (doing(before=lambda self, x: x * 2 if x.shape[-1] > 200 else x), "more than to pad"),
    "remembers a size": (lambda: Conv2dSameExport(4, 4, 3, stride=2), "remembers something of the inputs"),
    "counts": (doing(before=counting), "remembers something of the inputs"),
    "without gradients": (doing(before=lambda self, x: torch.no_grad()(F.pad)(x, (0, 1))), "switches gradients"),
    "a backward of its own": (doing(before=lambda self, x: Reversing.apply(x)), "more than to pad|gradients"),
    "looks at numbers": (doing(before=lambda self, x: x if x.sum() > 0 else -x), "more than to pad|without numbers"),
    "returns its input too": (doing(behind=lambda self, x: (x, x)), "returns something else"),
}


@pytest.mark.parametrize(("build", "spec"), READ.values(), ids=READ)
def test_what_a_conv_computes_is_read_by_watching_it(build: Callable[[], nn.Conv2d], spec: ConvSpec) -> None:
    conv = build().double()
    before = copy.deepcopy(vars(conv))
    assert convs.read(conv) == spec
    assert vars(conv).keys() == before.keys()
    twin = spec.holding(conv)
    for _, _, h, w in SIZES:
        x = torch.randn(2, 4, h, w, dtype=torch.float64)
        assert torch.equal(twin(x), conv(x))


@pytest.mark.parametrize(("build", "why"), KEPT.values(), ids=KEPT)
def test_a_conv_that_does_more_stays_with_what_it_does(build: Callable[[], nn.Conv2d], why: str) -> None:
    torch.manual_seed(0)
    conv = build()
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(convs.read(conv))
    (entry,) = surgeon.plan(nn.Sequential(conv), "acnet").convs
    kind = type(conv).__name__
    assert (entry.skip or "").startswith(f"{kind} is a subclass of Conv2d with a forward of its own: it ")
    with pytest.raises(PlanError, match=kind):
        surgeon.convert(nn.Sequential(conv), "acnet", (2, 4, 9, 9))


def test_a_conv_with_more_tensors_or_another_way_to_store_them_stays() -> None:
    adapted = tiny.NamedConv(4, 4, 3)
    adapted.scale = nn.Parameter(torch.ones(1))
    assert convs.read(adapted) == "it also holds scale, which a block would not have"
    renaming = type("Renaming", (nn.Conv2d,), {"_load_from_state_dict": lambda self, *_: None})(4, 4, 3)
    assert "stores its tensors in a way of its own" in str(convs.read(renaming))


class Stem(nn.Module):
    """Strided, padded convs of other packages as EfficientNet has them, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.static = tiny.PadsFirst(8, 8, 3, sides=(0, 1, 2, 0), bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.named = tiny.NamedConv(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.bn2(self.depthwise(x)).relu()
        return self.named(self.bn3(self.static(x)).relu())


PATHS = {"stem": Conv2dSame, "depthwise": Conv2dSame, "static": tiny.PadsFirst, "named": tiny.NamedConv}


def stem() -> nn.Module:
    torch.manual_seed(0)
    return shake_(Stem()).double().eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_swap_is_exact_in_both_modes_where_the_norm_is_taken_over(size: tuple[int, ...], training: bool) -> None:
    net = stem()
    converted = surgeon.convert(net, "acnet", SIZES[0])
    assert all(isinstance(converted.get_submodule(path), ACBlock) for path in PATHS)
    taken = {entry.path: entry.takes_norm for entry in surgeon.plan(net, "acnet", SIZES[0]).convs}
    assert taken == {"stem": ("bn1",), "depthwise": ("bn2",), "static": ("bn3",), "named": ()}
    x = torch.randn(size, dtype=torch.float64)
    if training:
        del net.named, converted.named  # no norm belongs to it
        net.named = converted.named = nn.Identity()
    with torch.no_grad():
        assert relative(converted.train(training)(x), net.train(training)(x)) <= 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_was_folded_is_of_the_class_that_it_was_with_its_attributes(size: tuple[int, ...]) -> None:
    net = stem()
    converted = surgeon.convert(net, "acnet", SIZES[0])
    with torch.no_grad():
        for block in converted.modules():
            if isinstance(block, ACBlock):
                block.ver_bn.weight.normal_()
    fused = surgeon.fuse(converted)
    assert {path: type(fused.get_submodule(path)) for path in PATHS} == PATHS
    assert fused.named.made_for == "a test"
    assert isinstance(fused.static.static_padding, nn.ZeroPad2d)
    assert fused.stem.bias is not None
    x = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(fused(x), converted(x)) <= 1e-12
        assert relative(fused(x), net(x)) > 1e-3  # it was trained, so to speak
    report = surgeon.verify(converted, fused, size)
    assert report.verdict == "equivalent", report
    with torch.no_grad():
        fused.stem.weight[0, 0, 0, 0] += 1e-6
    assert surgeon.verify(converted, fused, size).verdict == "different"


def test_with_keep_norms_the_weights_fit_into_the_class_that_it_was() -> None:
    net = stem()
    converted = surgeon.convert(net, "acnet", SIZES[0])
    fused = surgeon.fuse(converted, keep_norms=True)
    assert {path: type(fused.get_submodule(path)) for path in PATHS} == PATHS
    again = stem()
    again.load_state_dict(fused.state_dict())
    x = torch.randn(SIZES[1], dtype=torch.float64)
    with torch.no_grad():
        assert relative(fused(x), net(x)) <= 1e-12
        assert relative(again(x), net(x)) <= 1e-12
    assert surgeon.verify(converted, fused, SIZES[1]).verdict == "equivalent"


def test_a_fold_that_the_class_would_not_compute_is_a_conv_of_surgeons() -> None:
    class NeverBiased(Conv2dSame):
        def forward(self, x: Tensor) -> Tensor:
            return nn.Conv2d.forward(self, x) if self.bias is not None else super().forward(x)

    conv = NeverBiased(4, 4, 3, stride=2, bias=False)
    net = nn.Sequential(conv, shake_(nn.BatchNorm2d(4))).double().eval()
    fused = surgeon.fuse(surgeon.convert(net, "acnet", (1, 4, 9, 9)))
    assert type(fused[0]) is PaddedConv2d
    x = torch.randn(2, 4, 8, 11, dtype=torch.float64)
    assert relative(fused(x), net(x)) <= 1e-12


def test_a_block_that_knows_no_such_padding_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in registry().values():
        monkeypatch.setattr(kind, "pads_its_input", False)
    plan = surgeon.plan(nn.Sequential(Conv2dSame(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3)), "acnet")
    assert "pads its input by a rule of its own" in (plan.convs[0].skip or "")
    assert plan.convs[1].swap == "acblock"
    spec = ConvSpec(4, 4, (3, 3), pads_input="same")
    assert contract.refusal(registry()["acblock"], spec, None, registry()["acblock"].Options())


@pytest.mark.parametrize(
    "origin",
    [7, nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Conv2d.__new__(tiny.NamedConv)],
    ids=["number", "module", "conv", "empty"],
)
def test_an_origin_from_a_file_that_does_not_fit_is_not_taken(origin: object) -> None:
    net = stem()
    converted = surgeon.convert(net, "acnet", SIZES[0])
    vars(converted.stem)["origin"] = origin
    fused, x = surgeon.fuse(converted), torch.randn(SIZES[1], dtype=torch.float64)
    assert type(fused.stem) is PaddedConv2d
    with torch.no_grad():
        assert relative(fused(x), net(x)) <= 1e-12


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_hold_such_blocks_and_such_convs(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"own{suffix[1:]}.py").write_text(NETS, encoding="utf-8")
    arch = f"{tmp_path / f'own{suffix[1:]}.py'}:make"
    net = surgeon.load(arch)
    converted = surgeon.convert(net, "acnet", (1, 3, 16, 17))
    fused, x = surgeon.fuse(converted), torch.randn(2, 3, 17, 20)
    for name, model in (("converted", converted), ("fused", fused)):
        path = tmp_path / (name + suffix)
        surgeon.save(model, path, arch=arch)
        again = surgeon.load(path, arch=arch if suffix == ".safetensors" else None)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        assert type(surgeon.fuse(again)[0]) is Conv2dSame


NETS = """
from timm.layers import Conv2dSame
from torch import nn

def make():
    return nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
"""


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_convs.py").write_text(NETS, encoding="utf-8")
    net, plan = f"{tmp_path / 'own_convs.py'}:make", tmp_path / "plan.yaml"
    shape = ("--input", "1,3,17,16")
    assert run_surgeon("plan", net, "-r", "acnet", "-o", plan, *shape) == 0
    assert "pads_input: same" in plan.read_text(encoding="utf-8")
    assert run_surgeon("convert", net, "--plan", plan, "-o", tmp_path / "a.pt", *shape) == 0
    assert run_surgeon("fuse", tmp_path / "a.pt", "-o", tmp_path / "b.pt") == 0
    assert run_surgeon("verify", tmp_path / "a.pt", tmp_path / "b.pt") == 0
    assert run_surgeon("survey", net, *shape) == 0
    assert "padding=same (TensorFlow)" in capsys.readouterr().out
    plan.write_text(plan.read_text(encoding="utf-8").replace("pads_input: same", "pads_input: valid"), encoding="utf-8")
    assert run_surgeon("convert", net, "--plan", plan, "-o", tmp_path / "c.pt", *shape) == 2
    assert not (tmp_path / "c.pt").exists()
    said = capsys.readouterr().err
    assert "convs[0]" in said
    assert "Traceback" not in said
