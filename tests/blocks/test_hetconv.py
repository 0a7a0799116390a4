"""HetConv against a dense conv whose taps are masked by hand, straight from the paper's definition."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import narrow_torchvision, relative, run_surgeon, shake_
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet
from surgeon.blocks.hetconv import HetConv, HetConvOptions
from surgeon.conv.spec import ConvSpec


def groups(block: HetConv) -> tuple[list[int], list[int]]:
    """The group of every filter and of every channel."""
    spec, p = block.spec, block.p
    filters, channels = list(range(spec.c_out)), list(range(spec.c_in))
    if block.layout == "interleaved":
        return [i % p for i in filters], [j % p for j in channels]
    if block.layout == "best":
        filters = block.filter_place.tolist()
        order = block.channel_order.tolist()
        channels = [order.index(j) for j in channels]
    return [i // (spec.c_out // p) for i in filters], [j // (spec.c_in // p) for j in channels]


def masked(weight: Tensor, block: HetConv) -> Tensor:
    """Zero every off-centre tap that HetConv does not have."""
    kh, kw = block.spec.kernel
    weight = weight.clone()
    filters, channels = groups(block)
    for i, row in enumerate(filters):
        for j, column in enumerate(channels):
            if row != column:
                centre = weight[i, j, kh // 2, kw // 2].clone()
                weight[i, j] = 0
                weight[i, j, kh // 2, kw // 2] = centre
    return weight


def dense(spec: ConvSpec, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    conv = spec.build(like=torch.empty(0, dtype=torch.float64))
    conv.reset_parameters()
    return conv


def thinned(conv: nn.Conv2d, **options: object) -> HetConv:
    chosen = HetConvOptions.model_validate(options)
    return HetConv.from_conv(conv, chosen, norm=None, generator=torch.Generator().manual_seed(0))


def reference(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """The conv with another kernel, its padding done by hand."""
    spec = ConvSpec.of(conv)
    top, bottom, left, right = spec.pads
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return F.conv2d(F.pad(x, (left, right, top, bottom), mode=mode), weight, conv.bias, spec.stride, 0, spec.dilation)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConvSpec, int, str]:
    p = draw(st.integers(2, 5))
    kernel = (draw(st.sampled_from([1, 3, 5, 7])), draw(st.sampled_from([1, 3, 5, 7])))
    assume(kernel != (1, 1))
    same = draw(st.booleans())
    return (
        ConvSpec(
            p * draw(st.integers(1, 3)),
            p * draw(st.integers(1, 3)),
            kernel,
            stride=(1, 1) if same else (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            padding="same" if same else (draw(st.integers(0, 6)), draw(st.integers(0, 6))),
            dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        ),
        p,
        draw(st.sampled_from(["block", "interleaved", "best"])),
    )


@settings(max_examples=500, deadline=None, derandomize=True)
@given(cases())
def test_in_every_geometry_it_is_the_masked_conv(case: tuple[ConvSpec, int, str]) -> None:
    spec, p, layout = case
    assert HetConv.refusal(spec, None, HetConvOptions(p=p)) is None
    conv = dense(spec)
    block = thinned(conv, p=p, layout=layout)
    x = torch.randn(2, spec.c_in, 20, 21, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(conv, masked(conv.weight, block), x)
        assert relative(block(x), expected) <= 1e-12
        assert relative(block.fold()(x), expected) <= 1e-12
        assert relative(block.deploy()(x), expected) <= 1e-12


@pytest.mark.parametrize("layout", ["block", "interleaved", "best"])
def test_projection_is_exact_and_nearest(layout: str) -> None:
    spec = ConvSpec(12, 8, (3, 3), padding=(1, 1))
    conv = dense(spec)
    block = thinned(conv, p=4, layout=layout)
    folded = block.fold()
    assert torch.equal(folded.weight, masked(conv.weight, block))
    again = thinned(folded, p=4, layout=layout)
    assert torch.equal(again.fold().weight, folded.weight)  # what is one already is kept as it is


def off_centre(weight: Tensor) -> Tensor:
    """Energy outside the centre tap of 3×3 kernels."""
    weight = weight.detach()
    return weight.square().sum() - weight[..., 1, 1].square().sum()


def test_the_best_groups_are_found_where_they_are() -> None:
    """A conv whose 3×3 kernels are within four hidden groups of filters and channels: nothing is lost."""
    torch.manual_seed(0)
    conv = dense(ConvSpec(16, 24, (3, 3), padding=(1, 1)))
    rows, columns = torch.randperm(24) % 4, torch.randperm(16) % 4
    with torch.no_grad():
        outside = rows[:, None] != columns
        centre = conv.weight[..., 1, 1].clone()
        conv.weight[outside] = 0
        conv.weight[..., 1, 1] = centre
    block = thinned(conv, p=4, layout="best")
    assert torch.equal(block.fold().weight, conv.weight)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        assert relative(block(x), conv(x)) <= 1e-12
        assert relative(thinned(conv, p=4)(x), conv(x)) > 0.1


@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_kept_energy_is_that_of_the_folded_kernel(p: int) -> None:
    conv = dense(ConvSpec(32, 16, (3, 3)))
    kept = HetConv.kept_energy(conv.weight, HetConvOptions(p=p, layout="best"))
    for layout, share in kept.items():
        folded = thinned(conv, p=p, layout=layout).fold().weight
        assert share == pytest.approx(float(off_centre(folded) / off_centre(conv.weight)), rel=1e-9)
    assert kept["best"] > max(kept["block"], kept["interleaved"])


def test_the_plan_says_what_the_layout_that_was_chosen_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = HetConv.kept_in_words({"block": 0.25, "interleaved": 0.31}, HetConvOptions(p=4, layout="interleaved"))
    assert words == "keeps 31% of the energy off the centre (block 25%)"
    torch.save(nn.Sequential(dense(ConvSpec(32, 16, (3, 3))).float()), tmp_path / "net.pt")
    (tmp_path / "r.yaml").write_text("{surgeon: 1, title: T, rules: [{swap: hetconv, with: {layout: interleaved}}]}")
    assert run_surgeon("plan", tmp_path / "net.pt", "-r", tmp_path / "r.yaml", "--input", "1,32,8,8", "--json") == 0
    [entry] = json.loads(capsys.readouterr().out)["convs"]
    options = HetConvOptions.model_validate(entry["with"])
    assert run_surgeon("plan", tmp_path / "net.pt", "-r", tmp_path / "r.yaml", "--input", "1,32,8,8") == 0
    told = "".join(capsys.readouterr().out.split())
    words = HetConv.kept_in_words(entry["kept_energy"], options).split()
    assert words[0] == "keeps"
    assert all(word in told for word in words)


def test_the_same_weights_give_the_same_groups_in_every_dtype_they_fit_in() -> None:
    conv = dense(ConvSpec(32, 32, (3, 3))).bfloat16()
    low, high = (
        thinned(copy.deepcopy(conv).to(dtype), p=4, layout="best") for dtype in (torch.bfloat16, torch.float64)
    )
    assert torch.equal(low.channel_order, high.channel_order)
    assert torch.equal(low.filter_place, high.filter_place)


def test_groups_are_found_in_trained_weights_only() -> None:
    with pytest.raises(ValueError, match="layout: best is found in trained weights"):
        HetConvOptions.model_validate({"layout": "best", "init": "scratch"})


def test_on_the_trained_demo_network_the_best_layout_is_nearest_at_every_conv() -> None:
    model, x = SmallResNet(), data.images().test_x[:100]
    model.load_state_dict(data.weights())
    apart: dict[str, dict[str, float]] = {}
    for layout in ("block", "interleaved", "best"):
        converted = surgeon.convert(model, "hetconv-p4", x, overrides=[f"rules[0].with.layout={layout}"])
        report = surgeon.verify(model, converted, x)
        apart[layout] = {site.path: site.isolated for site in report.sites if site.kind_b == "HetConv"}
    assert len(apart["best"]) == 6
    for path, distance in apart["best"].items():
        assert distance < 0.98 * min(apart["block"][path], apart["interleaved"][path])


@pytest.mark.parametrize("layout", ["block", "interleaved", "best"])
def test_training_never_grows_a_tap_that_the_function_has_not(layout: str) -> None:
    spec = ConvSpec(8, 12, (3, 3), padding=(1, 1))
    block = thinned(dense(spec), p=4, layout=layout)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    torch.manual_seed(1)
    x, target = torch.randn(4, 8, 9, 9, dtype=torch.float64), torch.randn(4, 12, 9, 9, dtype=torch.float64)
    start = block.fold().weight.clone()
    for _ in range(200):
        loss = F.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = block.fold().weight
    assert relative(trained, start) > 0.1
    assert torch.equal(trained, masked(trained, block))
    with torch.no_grad():
        assert relative(block.fold()(x), block(x)) <= 1e-12


def test_its_parameters_are_the_taps_it_has() -> None:
    spec = ConvSpec(64, 128, (3, 3), bias=False)
    block = thinned(dense(spec), p=4)
    assert sum(p.numel() for p in block.parameters()) == 128 * (16 * 9 + 48)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, False)])
def test_a_pair_of_other_code_converts_exactly(stride: int, bias: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, 12, 3, stride, padding=1, groups=4, bias=bias[0]).double()
    pointwise = nn.Conv2d(8, 12, 1, stride, bias=bias[1]).double()
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    block = HetConv.from_grouped_and_pointwise(grouped, pointwise)
    assert relative(block(x), grouped(x) + pointwise(x)) <= 1e-12
    assert torch.equal(block.fold().weight, masked(block.fold().weight, block))


@pytest.mark.parametrize(
    ("grouped", "pointwise"),
    [
        (nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(8, 12, 1, stride=2)),
        (nn.Conv2d(8, 12, 3, padding=0, groups=4), nn.Conv2d(8, 12, 1)),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(4, 12, 1)),
    ],
    ids=["no groups", "stride", "padding", "channels"],
)
def test_what_is_no_such_pair_is_refused(grouped: nn.Conv2d, pointwise: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="are not a grouped conv and the 1x1 conv"):
        HetConv.from_grouped_and_pointwise(grouped, pointwise)


@pytest.mark.parametrize(
    ("spec", "p", "says"),
    [
        (ConvSpec(8, 8, (1, 1)), 2, "1x1"),
        (ConvSpec(8, 8, (2, 3)), 2, "2 is even"),
        (ConvSpec(8, 8, (3, 3), groups=2), 2, "2 groups"),
        (ConvSpec(12, 18, (3, 3)), 4, "2, 3, 6 would do"),
        (ConvSpec(3, 64, (3, 3)), 4, "nor into any other number"),
    ],
)
def test_refusals_say_why_and_what_would_do(spec: ConvSpec, p: int, says: str) -> None:
    assert says in str(HetConv.refusal(spec, None, HetConvOptions(p=p)))


class Vgg16ForCifar(nn.Module):
    """VGG-16 at 32×32 with two fully connected layers, as the paper counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg16_bn(weights=None).features
        self.classifier = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


# P → formula and executed, in millions of multiply-adds (from the paper's eq. 3–6, computed by hand); the paper prints
# 175.23, 105.98, 71.35, 54.04, 45.38, 41.05.
VGG = {
    2: (175.05, 192.4),
    4: (105.85, 114.5),
    8: (71.24, 75.6),
    16: (53.94, 56.1),
    32: (45.29, 46.4),
    64: (40.97, 41.5),
}


@pytest.mark.parametrize("p", VGG)
def test_costs_of_vgg_16_are_those_of_the_paper(p: int) -> None:
    with torch.device("meta"):
        model = Vgg16ForCifar()
    plan = surgeon.plan(model, "hetconv-p4", (1, 3, 32, 32), overrides=[f"rules[0].with.p={p}"])
    ideal, executed = VGG[p]
    assert len(plan.swaps) == 12
    assert plan.total.macs.before / 1e6 == pytest.approx(313.46, abs=0.005)
    assert plan.total.ideal_macs / 1e6 == pytest.approx(ideal, abs=0.005)
    assert plan.total.macs.after / 1e6 == pytest.approx(executed, abs=0.05)


def test_costs_of_resnet_50() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None)
    plan = surgeon.plan(model, "hetconv-p4", (1, 3, 224, 224))
    assert plan.total.ideal_macs / 1e9 == pytest.approx(2.856, abs=0.0005)
    converted = surgeon.convert(model, plan)
    with FlopCounterMode(display=False) as counter:
        converted.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * plan.total.macs.after


@pytest.mark.parametrize(
    ("build", "count"),
    [(lambda: narrow_torchvision("vgg16_bn"), 12), (lambda: narrow_torchvision("resnet50"), 16)],
    ids=["vgg16_bn", "resnet50"],
)
def test_from_the_command_line_it_is_approximate_and_says_how_far(
    build: Callable[[], nn.Module],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(shake_(build(), 1, gently=True), "net.pt")
    assert run_surgeon("convert", "net.pt", "--recipe", "hetconv-p4", "--input=1,3,64,64") == 0
    capsys.readouterr()
    assert run_surgeon("verify", "net.pt", "net.hetconv-p4.pt", "--json") == 3
    report = json.loads(capsys.readouterr().out)
    swapped = [site for site in report["sites"] if site["kind_b"] == "HetConv"]
    assert len(swapped) == count
    assert all(0.1 < site["isolated"] < 2 for site in swapped)


def test_fuse_makes_one_conv_of_it_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    converted = surgeon.convert(net, "hetconv-p4", (1, 8, 12, 12))
    surgeon.save(converted, tmp_path / "net.pt")
    assert run_surgeon("fuse", tmp_path / "net.pt", "-o", tmp_path / "few.pt") == 0
    assert "--allow" not in capsys.readouterr().err  # surgeon opens it as it is
    assert [type(one) for one in surgeon.load(tmp_path / "few.pt")[0].children()] == [nn.Conv2d, nn.Sequential]
    assert run_surgeon("verify", tmp_path / "net.pt", tmp_path / "few.pt") == 0
    assert run_surgeon("fuse", tmp_path / "net.pt", "-o", tmp_path / "dense.pt", "--dense") == 0
    assert type(surgeon.load(tmp_path / "dense.pt")[0]) is nn.Conv2d
    assert run_surgeon("verify", tmp_path / "net.pt", tmp_path / "dense.pt") == 0


def test_p_by_width_takes_fewer_kernels_in_wider_convs() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    plan = surgeon.plan(model, "hetconv-by-width", (1, 3, 64, 64))
    chosen = {entry.path: entry.options["p"] for entry in plan.swaps}
    assert chosen["layer1.0.conv1"] == chosen["layer2.1.conv1"] == 2
    assert chosen["layer3.1.conv1"] == 4
    assert chosen["layer4.1.conv1"] == 8
