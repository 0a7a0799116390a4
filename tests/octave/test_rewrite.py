"""Joins and splits between octave convs go, rule by rule, and not a bit of the result changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
import torchvision
from helpers import narrow, narrow_torchvision, on_meta, relative, run_surgeon, shake_
from small_networks import MobileNetV1, small_densenet
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import FrozenBatchNorm2d

import surgeon
from surgeon.analysis.network import Network
from surgeon.analysis.program import decode, encode
from surgeon.analysis.rewritten import Rewritten
from surgeon.blocks.octave import OctaveConv
from surgeon.blocks.pairs import PairNorm
from surgeon.errors import ModelError
from surgeon.octave import rewrite as seams
from surgeon.surgery import operate

SHAPE = (2, 8, 12, 10)


def conv(c_in: int = 8, c_out: int = 8, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


class Between(nn.Module):
    """Two convs and what a rule has to get through between them."""

    def __init__(self, step: Callable[[Tensor], Tensor] | nn.Module, c_mid: int = 8) -> None:
        super().__init__()
        self.first, self.second = conv(), conv(c_mid)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.step(self.first(x)))


class Residual(nn.Module):
    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y.relu())
        z = z.add_(y) if self.in_place else z + y
        return self.third(z * 0.5)


class Excited(nn.Module):
    """Squeeze and excitation: a number for every channel, made from its mean."""

    def __init__(self, pooling: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.pooling = conv(), conv(), pooling
        self.squeeze, self.excite = conv(8, 2, 1), conv(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y * self.excite(self.squeeze(self.pooling(y)).relu()).sigmoid())


class Dense(nn.Module):
    """Three convs, each of which reads all that was written before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(8, 6), nn.BatchNorm2d(14)
        self.first, self.second = conv(6, 8), conv(14, 8)
        self.third = conv(22, 8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.first(a)
        c = self.second(F.relu(self.bn(torch.cat([a, b], 1))))
        return self.third(torch.cat((a, b, c), dim=1))


class Classifier(nn.Module):
    """Two octave convs in front of a pooling that makes vectors."""

    def __init__(self, pooling: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.fc, self.pooling = conv(), conv(), nn.Linear(8, 3), pooling

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pooling(self.second(self.first(x))), 1))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "a subclass": type("Renamed", (nn.BatchNorm2d,), {}),
    "synchronised": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "timm's frozen one": FrozenBatchNormAct2d,
    "timm's frozen one with GELU": lambda c: FrozenBatchNormAct2d(c, act_layer="gelu"),
    **{f"timm's with {act}": partial(BatchNormAct2d, act_layer=act) for act in ("relu", "silu", "gelu", "prelu")},
    "timm's with dropout": partial(BatchNormAct2d, drop_layer=nn.Dropout),
}
FIXED = {"alpha_in": 0.5, "alpha_out": 0.5}
RULES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "split of join": (lambda: nn.Sequential(conv(), conv()), {"split(join)": 1}),
    "relu": (lambda: Between(nn.ReLU()), {"elementwise": 1}),
    "relu in place": (lambda: Between(nn.ReLU(inplace=True)), {"elementwise": 1}),
    "a function": (lambda: Between(F.gelu), {"elementwise": 1}),
    "a method": (lambda: Between(lambda x: x.clamp(-0.5, 0.5)), {"elementwise": 1}),
    "dropout": (lambda: Between(nn.Dropout(0.5)), {"elementwise": 1}),
    "a norm": (lambda: Between(nn.BatchNorm2d(8)), {"norm": 1}),
    "a norm without affine": (lambda: Between(nn.BatchNorm2d(8, affine=False)), {"norm": 1}),
    **{f"a norm: {name}": (lambda make=make: Between(make(8)), {"norm": 1}) for name, make in NORMS.items()},
    "a number": (lambda: Between(lambda x: 2 * x + 1), {"product": 1, "sum": 1}),
    "a sum": (Residual, {"sum": 1, "product": 1}),
    "a sum in place": (lambda: Residual(in_place=True), {"sum": 1}),
    "maxima of 2×2": (lambda: Between(nn.MaxPool2d(2)), {"spatial": 1}),
    "maxima of 3×3": (lambda: Between(nn.MaxPool2d(3, 2, 1)), {"spatial": 1}),
    "means of 2×2": (lambda: Between(lambda x: F.avg_pool2d(x, 2, 2)), {"spatial": 1}),
    "a ReLU in place behind a pooling": (
        lambda: Between(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(True))),
        {"spatial": 1, "elementwise": 1},
    ),
    "two poolings": (lambda: Between(nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 1))), {"spatial": 2}),
    "excitation by adaptive pooling": (lambda: Excited(nn.AdaptiveAvgPool2d(1)), {"product": 1, "spatial": 1}),
    "excitation by a mean": (lambda: Excited(lambda x: x.mean((2, 3), keepdim=True)), {"product": 1, "spatial": 1}),
    "concatenations": (Dense, {"concat": 2, "norm": 1}),
    "global pooling": (lambda: Classifier(nn.AdaptiveAvgPool2d(1)), {"spatial": 1}),
    "global mean": (lambda: Classifier(lambda x: x.mean([-2, -1])), {"spatial": 1}),
}


def octave_of(net: nn.Module, *names: str, seams: str = "remove", **options: object) -> surgeon.Plan:
    rule = {"swap": "octave", "with": {"min_size": 1, "seams": seams, **options}}
    if names:
        rule["match"] = {"name": list(names)}
    return surgeon.plan(net, {"surgeon": 1, "title": "T", "rules": [rule]}, SHAPE)


def both_forms(net: nn.Module, plan: surgeon.Plan) -> tuple[nn.Module, nn.Module, seams.Outcome]:
    """The network conv by conv, and without seams."""
    local, free, looked_at = copy.deepcopy(net), copy.deepcopy(net), Network(net, called_with=plan.inputs)
    for model in (local, free):
        operate.place_(model, operate.prepare(model, plan), looked_at)
    operate.stream_(local, plan, looked_at, only_low_pass=True)
    return local.eval(), free.eval(), operate.stream_(free, plan, looked_at)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def network(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return shake_(build(), gently=True).eval()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_and_changes_no_bit(name: str) -> None:
    build, expected = RULES[name]
    net = network(build)
    wide = [path for path, m in net.named_modules() if isinstance(m, nn.Conv2d) and path not in ("squeeze", "excite")]
    plan = octave_of(net, *wide, **({"alpha_out": 0.5} if isinstance(net, Classifier) else {}))
    local, free, outcome = both_forms(net, plan)
    assert all(outcome.fired[rule] >= times for rule, times in expected.items()), outcome.fired
    assert not [seam for seam in outcome.seams if seam.kind != "split"]
    assert isinstance(free, Rewritten)
    for h, w in ((12, 10), (13, 9), (7, 7)):
        x = noise(2, 8, h, w)
        with torch.no_grad():
            assert torch.equal(local(x.clone()), free(x.clone()))
            assert relative(free(x), net(x)) > 1e-3  # so there was something to compare


@pytest.mark.parametrize("name", ["relu", "a norm", "a sum", "concatenations", "maxima of 2×2"])
def test_a_number_that_is_off_would_show(name: str) -> None:
    net = network(RULES[name][0]).double()
    local, free, _ = both_forms(net, octave_of(net))
    next(free.parameters()).data[0, 0, 0, 0] += 1e-6
    x = noise(*SHAPE, dtype=torch.float64)
    with torch.no_grad():
        assert relative(free(x), local(x)) > 1e-10


@pytest.mark.parametrize("name", RULES)
def test_fused_it_computes_the_same(name: str) -> None:
    net = network(RULES[name][0]).double()
    free = surgeon.convert(net, octave_of(net)).eval()
    fused = surgeon.fuse(free)
    assert not any(isinstance(m, OctaveConv) for m in fused.modules())
    x = noise(2, 8, 13, 10, dtype=torch.float64)
    with torch.no_grad():
        assert relative(fused(x.clone()), free(x.clone())) <= 1e-12
        assert relative(fused.to(memory_format=torch.channels_last)(x.clone()), free(x.clone())) <= 1e-12


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a step on no list": (lambda: Between(lambda x: x.flip(-1)), "'flip' needs the whole map"),
    "a norm of its own kind": (
        lambda: Between(nn.GroupNorm(2, 8)),
        " is a GroupNorm, which mixes channels: the two streams",
    ),
    "a norm that tracing goes into": (
        lambda: Between(GroupNormAct(8, 2)),
        " is a GroupNormAct, which mixes channels: the two streams",
    ),
    "an instance norm": (
        lambda: Between(nn.InstanceNorm2d(8)),
        " is a InstanceNorm2d, which takes its statistics from",
    ),
    "a norm with a forward of its own": (
        lambda: Between(tiny.OwnNorm(8)),
        " is a OwnNorm, which has a forward of its own: the two streams have to be joined for it",
    ),
    "a norm with a softmax behind it": (
        lambda: Between(BatchNormAct2d(8, act_layer=nn.Softmax2d, inplace=None)),
        " runs its act (Softmax2d), which needs the whole map",
    ),
    "a softmax over channels": (lambda: Between(nn.Softmax2d()), "'step' needs the whole map"),
    "a plain conv": (lambda: Between(nn.Sequential(conv(), nn.ReLU())), "'step_0' needs the whole map"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_moved_stays_a_seam_with_the_reason(name: str) -> None:
    build, reason = UNSEEN[name]
    net = network(build)
    plan = octave_of(net, "first", "second", **FIXED)
    local, free, outcome = both_forms(net, plan)
    assert not outcome.rewritten  # nothing is gained, so the class stays
    assert type(free) is Between
    with torch.no_grad():
        assert torch.equal(local(noise(*SHAPE)), free(noise(*SHAPE)))
    longer = network(lambda: nn.Sequential(conv(), nn.ReLU(), *build().children()))
    plan = octave_of(longer, "0", "2", "3", **FIXED)
    assert any(seam.kind == "join" and reason.rpartition("'")[2] in seam.reason for seam in plan.seams), plan.seams


def test_an_in_place_step_on_no_list_is_seen_by_all_that_read_after_it() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = conv(), conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            y.squeeze_ = None if False else y.mul_
            y.mul_(y)
            return self.third(self.second(y) + y)

    net = network(Writes)
    local, free, _ = both_forms(net, octave_of(net))
    with torch.no_grad():
        assert torch.equal(local(noise(*SHAPE)), free(noise(*SHAPE)))


def test_a_plain_map_that_is_added_is_low_passed_and_the_plan_says_so() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = conv(), conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x).relu()) + x)

    net = network(Shortcut)
    plan = octave_of(net)
    assert [(one.step, one.operand) for one in plan.low_passed] == [("add", "x")]
    local, free, outcome = both_forms(net, plan)
    x = noise(*SHAPE)
    with torch.no_grad():
        assert torch.equal(local(x), free(x))
        blocks = [m for m in local.modules() if isinstance(m, OctaveConv)]
        low = torch.cat([x[:, :4], F.avg_pool2d(x[:, 4:], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)
        expected = blocks[2](blocks[1](blocks[0](x).relu()) + low)
        assert relative(free(x), expected) <= 1e-6
    pruned = plan.model_copy(update={"low_passed": ()})
    local, free, outcome = both_forms(net, pruned)
    assert any("adds a plain map" in seam.reason for seam in outcome.seams)
    with torch.no_grad():
        assert torch.equal(local(x), free(x))


def test_seams_that_are_to_be_kept_are_kept() -> None:
    net = network(lambda: nn.Sequential(conv(), nn.ReLU(), conv()))
    plan = octave_of(net, seams="keep")
    assert not plan.rewritten
    assert type(surgeon.convert(net, plan)) is nn.Sequential


REAL = {  # with a quarter of their channels, but for one of them
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "resnet50": lambda: narrow_torchvision("resnet50"),
    "resnext50": lambda: narrow_torchvision("resnext50_32x4d"),
    "mobilenet_v1": lambda: narrow(on_meta(MobileNetV1)),
    "mobilenet_v2": lambda: narrow_torchvision("mobilenet_v2"),
    "densenet": small_densenet,
    "vgg16_bn": lambda: narrow_torchvision("vgg16_bn", num_classes=2, init_weights=False),
    "seresnet18": lambda: narrow(on_meta(lambda: timm.create_model("seresnet18"))),
}


@pytest.mark.parametrize("name", REAL)
def test_real_networks_without_seams_are_themselves_bit_for_bit(name: str) -> None:
    net = network(REAL[name])
    plan = surgeon.plan(net, "octave", (1, 3, 224, 224))
    local, free, outcome = both_forms(net, plan)
    assert isinstance(free, Rewritten)
    ends = [seam.reason for seam in outcome.seams]  # where only strided convs read the last two streams
    assert ends == (["'layer4.0.conv1' (Conv2d) needs the whole map"] if "resnet18" in name else [])
    assert {key: t.shape for key, t in free.state_dict().items()} == {k: t.shape for k, t in net.state_dict().items()}
    for side in (224, 225, 200, 97):
        with torch.no_grad():
            x = noise(1, 3, side, side)
            assert torch.equal(local(x), free(x))
    assert len(plan.swaps) >= 10


def octave_resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = network(lambda: narrow_torchvision("resnet18", num_classes=5)).to(dtype)
    return surgeon.convert(net, "octave", (1, 3, 64, 64), overrides=["rules[1].with.min_size=2"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_islands_are_stored_as_data_and_open_again(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model = octave_resnet(dtype)
    path = tmp_path / f"net{suffix}"
    if suffix == ".pt":
        surgeon.save(model, path)
        again = surgeon.load(path)
    else:
        torch.save(narrow_torchvision("resnet18", num_classes=5).to(dtype), tmp_path / "plain.pt")
        surgeon.save(model, path)
        again = surgeon.load(path, arch=str(tmp_path / "plain.pt"))
    assert isinstance(again, Rewritten)
    for training in (False, True):
        x = noise(2, 3, 64, 64, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(again.train(training)(x), model.train(training)(x))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_a_resnet50_is_converted_trained_fused_and_verified_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network(lambda: narrow_torchvision("resnet50", num_classes=5)), "net.pt")
    small = ("--input=1,3,64,64", "--set=rules[1].with.min_size=2")
    assert run_surgeon("convert", "net.pt", "-r", "octave", *small) == 0
    model = surgeon.load("net.octave.pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = F.cross_entropy(model.train()(noise(4, 3, 64, 64)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    surgeon.save(model, "trained.pt")
    assert run_surgeon("fuse", "trained.pt", small[0]) == 0
    assert run_surgeon("verify", "trained.pt", "trained.fused.pt", small[0]) == 0
    assert run_surgeon("verify", "net.pt", "net.octave.pt", small[0]) == 3


def test_original_checkpoints_load_and_the_reverse() -> None:
    plain, model = narrow_torchvision("resnet18", num_classes=5), octave_resnet()
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(octave_resnet().state_dict())


def test_it_is_the_same_in_channels_last_and_compiled() -> None:
    net = network(lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))
    model = surgeon.convert(net, "octave", (1, 3, 64, 64), overrides=["rules[1].with.min_size=2"])
    assert isinstance(model, Rewritten)
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        assert relative(last(x.to(memory_format=torch.channels_last)), expected) <= 1e-5
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative(compiled(x), expected) <= 1e-6
    model.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_goes_where_conv_by_conv_training_goes_but_for_running_variances() -> None:
    """Of a low stream the sample is a quarter: torch corrects its variance by n/(n−1) with the smaller n."""
    net = network(lambda: narrow_torchvision("resnet18", num_classes=5)).double()
    plan = surgeon.plan(net, "octave", (1, 3, 64, 64), overrides=["rules[1].with.min_size=2"])
    local, free, _ = both_forms(net, plan)
    x = noise(4, 3, 64, 64, dtype=torch.float64)
    for model in (local, free):
        model.train()(x).square().sum().backward()
    for (key, one), other in zip(local.named_parameters(), free.parameters(), strict=True):
        assert relative(other.grad, one.grad) <= 1e-9, key
    for key, one in local.state_dict().items():
        assert relative(free.state_dict()[key], one) <= (0.05 if "running_var" in key else 1e-12), key
    norm = free.get_submodule("layer1.0.bn1")
    assert isinstance(norm, PairNorm)
    n = 4 * 16 * 16
    before, theirs = net.layer1[0].bn1.running_var, local.get_submodule("layer1.0.bn1").running_var
    sample = lambda var, k: (var - 0.9 * before) / 0.1 * (k - 1) / k  # noqa: E731 - of the batch, uncorrected
    assert relative(sample(norm.running_var, n)[:8], sample(theirs, n)[:8]) <= 1e-9
    assert relative(sample(norm.running_var, n / 4)[8:], sample(theirs, n)[8:]) <= 1e-9


def test_a_norm_over_scattered_channels_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    plain = shake_(nn.BatchNorm2d(6, momentum=None)).double()
    pair = copy.deepcopy(plain)
    from surgeon.blocks.pairs import make_pair_norm_
    from surgeon.conv.streams import join, split

    low = ((1, 2), (4, 6))
    undo = make_pair_norm_(pair, low)
    x = join(*split(noise(3, 6, 8, 8, dtype=torch.float64), low), low)
    for _ in range(2):
        expected, (h, c) = plain.train()(x), pair.train()(split(x, low))
        assert relative(join(h, c, low), expected) <= 1e-12
    assert relative(pair.running_mean, plain.running_mean) <= 1e-12
    assert pair.num_batches_tracked == plain.num_batches_tracked
    undo()
    assert type(pair) is nn.BatchNorm2d


def test_functional_dropout_follows_the_mode() -> None:
    class Drops(nn.Module):
        def __init__(self, always: bool) -> None:
            super().__init__()
            self.first, self.second, self.always = conv(), conv(), always

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.dropout(self.first(x), 0.5, True if self.always else self.training))

    for always in (False, True):
        net = network(lambda always=always: Drops(always))
        model = surgeon.convert(net, octave_of(net))
        assert isinstance(model, Rewritten)
        x = noise(*SHAPE)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), model(x)) is not always
            assert not torch.equal(model.train()(x), model(x))


class TrainsItsOwnWay(nn.Sequential):
    def train(self, mode: bool = True) -> TrainsItsOwnWay:
        super().train(mode)
        self[1].eval()
        return self


def test_a_mode_of_its_own_is_kept() -> None:
    net = network(lambda: TrainsItsOwnWay(conv(), nn.BatchNorm2d(8), conv()))
    model = surgeon.convert(net, octave_of(net))
    assert isinstance(model, Rewritten)
    assert not model.train()[1].training
    assert model[2].training


class StoresItself(nn.Sequential):
    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


class NamesItsGraph(nn.Sequential):
    def graph(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (StoresItself, "StoresItself has its own __getstate__, which copies and files of a rewritten graph would not"),
        (NamesItsGraph, "NamesItsGraph has its own graph, a name that a rewritten graph uses for itself"),
    ],
)
def test_what_a_graph_would_lose_keeps_its_class_and_the_plan_says_why(kind: type[nn.Sequential], why: str) -> None:
    net = network(lambda: kind(conv(), nn.BatchNorm2d(8), conv()))
    plan = octave_of(net)
    [seam] = plan.seams
    assert seam.kind == "local"
    assert why in seam.reason
    assert type(surgeon.convert(net, plan)) is kind


def test_hooks_are_not_skipped() -> None:
    hooked = network(lambda: nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv()))
    hooked[0].register_forward_hook(lambda *_: None)
    assert "hooks are attached to 0" in octave_of(hooked).seams[0].reason


def test_hooks_between_convs_see_whole_maps() -> None:
    net = network(RULES["a norm"][0])
    seen: list[torch.Size] = []
    net.step.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    longer = nn.Sequential(conv(), nn.ReLU(), net).eval()
    plan = octave_of(longer, **FIXED)
    model = surgeon.convert(longer, plan)
    seen.clear()
    with torch.no_grad():
        model(noise(*SHAPE))
    assert seen == [torch.Size(SHAPE)]
    assert any("needs the whole map" in seam.reason for seam in plan.seams)


def test_a_network_that_cannot_be_traced_keeps_the_local_form_and_works() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if y.mean() < 1e9 else y

    net = network(Untraceable)
    plan = octave_of(net)
    assert {(entry.options["alpha_in"], entry.options["alpha_out"]) for entry in plan.swaps} == {(0.5, 0.5)}
    model = surgeon.convert(net, plan)
    assert type(model) is Untraceable
    with torch.no_grad():
        assert model(noise(*SHAPE)).shape == net(noise(*SHAPE)).shape


def test_what_goes_wrong_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), conv()))
    plan = octave_of(net)
    before = [(path, type(m), id(m)) for path, m in net.named_modules()]
    monkeypatch.setattr("surgeon.surgery.selfcheck.EXACT", -1.0)
    with pytest.raises(surgeon.errors.PassError, match="without seams"):
        surgeon.convert_(net, plan)
    assert [(path, type(m), id(m)) for path, m in net.named_modules()] == before
    with torch.no_grad():
        assert net(noise(*SHAPE)).shape == SHAPE


def program() -> dict[str, object]:
    model = surgeon.convert(net := network(lambda: nn.Sequential(conv(), nn.ReLU(), conv())), octave_of(net))
    assert isinstance(model, Rewritten)
    assert encode(decode(model.program)) == model.program
    return copy.deepcopy(model.program)


EVIL = {
    "a function on no list": lambda p: p["steps"].append(
        ["evil", "call_function", "os.system", ["true"], {"dict": []}]
    ),
    "an attribute of a value": lambda p: p["steps"].append(
        ["evil", "call_function", "getattr", [{"node": "input_1"}, "__class__"], {"dict": []}]
    ),
    "a method on no list": lambda p: p["steps"].append(
        ["evil", "call_method", "numpy", [{"node": "input_1"}], {"dict": []}]
    ),
    "Python in a path": lambda p: p["steps"].append(
        ["evil", "call_module", 'x"),__import__("os").system("true")#', [], {"dict": []}]
    ),
    "Python in a name": lambda p: p["steps"].append(["a=1;b", "call_module", "0", [], {"dict": []}]),
    "Python in a keyword": lambda p: p["steps"].append(["evil", "call_module", "0", [], {"dict": [["x=1,y", 1]]}]),
    "dunders": lambda p: p["steps"].append(["evil", "get_attr", "__class__.__mro__", [], {"dict": []}]),
    "a word of torch that is no dtype": lambda p: p["steps"].append(
        ["evil", "call_module", "0", [{"torch": "load"}], {"dict": []}]
    ),
    "an input with Python": lambda p: p["inputs"].append(["x=print()"]),
    "a later format": lambda p: p.update(format=99),
}


@pytest.mark.parametrize("what", EVIL)
def test_a_graph_that_surgeon_would_not_write_is_refused_before_anything_runs(what: str, tmp_path: Path) -> None:
    model = surgeon.convert(net := network(lambda: nn.Sequential(conv(), nn.ReLU(), conv())), octave_of(net))
    EVIL[what](model.program)
    with pytest.raises(ValueError, match=r"the graph in the file|reads the attribute"):
        decode(model.program)
    torch.save(model, tmp_path / "evil.pt")
    says = "was written by a later version" if what == "a later format" else "cannot be unpickled"
    with pytest.raises(ModelError, match=says):
        surgeon.load(tmp_path / "evil.pt")


def _kept(model: nn.Module, **values: object) -> None:
    vars(model).update(values)


REACHING = {  # steps that name what hangs on a module but is not registered in it
    "a method of a storage": ("call_module", "held._untyped_storage.from_file"),
    "a method of a buffer": ("call_module", "table.set_"),
    "a method of a module": ("call_module", "0.register_buffer"),
    "the dict of a module": ("get_attr", "0._parameters"),
    "a module, as a value": ("get_attr", "0"),
    "an object that is no data": ("get_attr", "held"),
    "an attribute of a tensor": ("get_attr", "table.data"),
    "a submodule that is not there": ("call_module", "0.9"),
    "a name that the class has, too": ("call_module", "forward"),
    "a name that an attribute hides": ("call_module", "shadowed"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("what", REACHING)
def test_a_step_reaches_only_what_is_registered(what: str, tmp_path: Path) -> None:
    model = surgeon.convert(net := network(lambda: nn.Sequential(conv(), nn.ReLU(), conv())), octave_of(net))
    model.register_buffer("table", torch.zeros(3))
    model._modules["shadowed"] = nn.ReLU()
    _kept(model, held=torch.zeros(4).storage(), shadowed=[1])
    op, target = REACHING[what]
    untouched = copy.deepcopy(model.program)
    model.program["steps"].append(["evil", op, target, [], {"dict": []}])
    torch.save(model, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="which is not registered in its module"):
        surgeon.load(tmp_path / "evil.pt")
    model.program = untouched
    torch.save(model, tmp_path / "good.pt")
    assert surgeon.load(tmp_path / "good.pt")(noise(*SHAPE)).shape == SHAPE


def test_what_was_checked_stays_as_it_was(tmp_path: Path) -> None:
    model = surgeon.convert(net := network(lambda: nn.Sequential(conv(), nn.ReLU(), conv())), octave_of(net))
    root, later = nn.Module(), []
    root.later = model.later = later  # filled before the module in it is, and appended to after that
    later.append(model)
    torch.save(root, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="has already checked"):
        surgeon.load(tmp_path / "evil.pt")


@pytest.mark.parametrize("target", ["table", "scale", "training", "0.weight"])
def test_a_step_reads_tensors_and_plain_values(target: str, tmp_path: Path) -> None:
    model = surgeon.convert(net := network(lambda: nn.Sequential(conv(), nn.ReLU(), conv())), octave_of(net))
    model.register_buffer("table", torch.zeros(3))
    model.scale = 2.5
    model.program["steps"].append(["more", "get_attr", target, [], {"dict": []}])
    torch.save(model, tmp_path / "good.pt")
    assert surgeon.load(tmp_path / "good.pt")(noise(*SHAPE)).shape == SHAPE


@pytest.mark.parametrize("name", ["program", "origin", "_run"])
def test_attributes_of_the_names_that_a_graph_is_kept_in_stay_what_they_are(name: str) -> None:
    net = network(lambda: nn.Sequential(conv(), nn.ReLU(), conv()))
    setattr(net, name, 7)
    plan = octave_of(net)
    assert plan.rewritten == ()
    assert any(f"its attribute {name}" in seam.reason for seam in plan.seams)
    assert getattr(surgeon.convert(net, plan), name) == 7


class _Looking(nn.Module):
    """Looks at a number, which a copy without numbers cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.sum() > 0 else -y


def test_a_network_that_looks_at_numbers_is_planned_and_converted() -> None:
    torch.manual_seed(0)
    plan = surgeon.plan(_Looking(), "octave", (1, 3, 16, 16), overrides=["rules[1].with.min_size=2"])
    assert plan.rewritten == ("body",)
    assert plan.total.macs is not None
    assert plan.total.macs.after < plan.total.macs.before
    assert isinstance(surgeon.convert(_Looking(), plan, (1, 3, 16, 16)).body, Rewritten)


class _Gated(nn.Module):
    """Normalises by torch.var and oscillates, as some networks of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        y = self.third(y.relu())
        return y / torch.var(y, dim=1, keepdim=True) + y.sin() * y.cos()


def test_steps_behind_the_streams_do_not_hold_them_up() -> None:
    torch.manual_seed(0)
    plan = surgeon.plan(_Gated(), "octave", SHAPE, overrides=["rules[1].with.min_size=2"])
    assert plan.rewritten == ("",)
