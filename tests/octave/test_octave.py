"""OctaveConv against the paper's four equations, written with plain F.conv2d and pooling done by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import relative, run_surgeon
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_networks import MobileNetV1
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from surgeon.app.demo import data
from surgeon.app.demo.net import SmallResNet
from surgeon.blocks.octave import FusedOctave, OctaveConv, OctaveConvOptions, StackedOctave
from surgeon.conv.spec import ConvSpec


def pooled(x: Tensor) -> Tensor:
    """The mean of every 2×2 window, or of what there is of it at the border."""
    h, w = x.shape[-2:]
    rows = [[x[..., i : i + 2, j : j + 2].mean((-2, -1)) for j in range(0, w, 2)] for i in range(0, h, 2)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def upped(x: Tensor, like: Tensor) -> Tensor:
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., : like.shape[-2], : like.shape[-1]]


def masked_to(conv: nn.Conv2d, rows: slice, columns: slice) -> Tensor:
    """The conv's kernel without groups, (filters of a stream, channels of a stream, kh, kw)."""
    spec = ConvSpec.of(conv)
    per_in, per_out = spec.c_in // spec.groups, spec.c_out // spec.groups
    full = conv.weight.new_zeros(spec.c_out, spec.c_in, *spec.kernel)
    for i in range(spec.c_out):
        start = i // per_out * per_in
        full[i, start : start + per_in] = conv.weight[i]
    return full[rows, columns]


def reference(conv: nn.Conv2d, x: Tensor, alpha_in: float, alpha_out: float, downsample: str) -> Tensor:
    """Equations 2 to 5, on plain tensors; at stride 2 as the paper's code or as the second lineage does."""
    spec = ConvSpec.of(conv)
    high_in, high_out = (c - math.floor(a * c) for a, c in ((alpha_in, spec.c_in), (alpha_out, spec.c_out)))
    streams = {"h": (slice(0, high_in), slice(0, high_out)), "l": (slice(high_in, None), slice(high_out, None))}

    def run(source: str, target: str, x: Tensor) -> Tensor:
        kernel = masked_to(conv, streams[target][1], streams[source][0])
        top, bottom, left, right = spec.pads
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        return F.conv2d(F.pad(x, (left, right, top, bottom), mode=mode), kernel, None, 1, 0, spec.dilation)

    h, low = x[:, :high_in], pooled(x[:, high_in:])
    has_low_in, has_low_out = high_in < spec.c_in, high_out < spec.c_out
    strided = spec.stride == (2, 2)
    if strided:
        h = pooled(h)
    high = run("h", "h", h)
    if has_low_in:
        if not strided:
            high = high + upped(run("l", "h", low), high)
        elif downsample == "paper":
            high = high + run("l", "h", low)
        else:
            high = high + upped(run("l", "h", pooled(low)), high)
    if conv.bias is not None:
        high = high + conv.bias[:high_out, None, None]
    if not has_low_out:
        return high
    out_low = run("h", "l", pooled(h))
    if has_low_in:
        out_low = out_low + run("l", "l", pooled(low) if strided else low)
    if conv.bias is not None:
        out_low = out_low + conv.bias[high_out:, None, None]
    return torch.cat([high, upped(out_low, high)], 1)


def conv_of(spec: ConvSpec, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    conv = spec.build(like=torch.empty(0, dtype=torch.float64))
    conv.reset_parameters()
    return conv


def octave(conv: nn.Conv2d, **options: object) -> OctaveConv:
    chosen = OctaveConvOptions.model_validate(options)
    return OctaveConv.from_conv(conv, chosen, norm=None, generator=torch.Generator())


Case = tuple[ConvSpec, dict[str, object], tuple[int, int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = (draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 3, 5])))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    spec = ConvSpec(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 4)),
        kernel,
        stride=draw(st.sampled_from([(1, 1), (2, 2)])),
        padding=tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "replicate", "reflect", "circular"])),
    )
    alphas = st.sampled_from([0.0, 0.25, 0.5, 0.75])
    options = {"alpha_in": draw(alphas), "alpha_out": draw(alphas)}
    assume(any(options.values()))
    options["downsample"] = draw(st.sampled_from(["paper", "pool-both"]))
    return spec, options, (draw(st.integers(1, 12)), draw(st.integers(1, 12)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_in_every_geometry_it_is_the_papers_equations(case: Case) -> None:
    spec, options, size = case
    chosen = OctaveConvOptions.model_validate(options)
    assume(OctaveConv.refusal(spec, size, chosen) is None)
    conv = conv_of(spec)
    x = torch.randn(2, spec.c_in, *size, dtype=torch.float64)
    with torch.no_grad():
        y = octave(conv, **options)(x)
        assert y.shape == F.conv2d(x, conv.weight, None, spec.stride, spec.padding, spec.dilation, spec.groups).shape
        assert relative(y, reference(conv, x, *chosen.alphas, chosen.downsample)) <= 1e-12


def test_the_two_lineages_of_stride_2_are_not_the_same() -> None:
    conv = conv_of(ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 2)))
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert relative(octave(conv, downsample="pool-both")(x), octave(conv)(x)) > 0.1


def test_where_the_low_channels_have_no_fine_detail_nothing_is_lost() -> None:
    """Maps that are constant on 2×2 windows, and a 1×1 kernel: split and join give back what they got."""
    conv = conv_of(ConvSpec(8, 8, (1, 1)))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :9, :11]
    with torch.no_grad():
        assert relative(octave(conv)(x), conv(x)) <= 1e-15


def test_it_has_the_keys_and_shapes_of_the_conv_and_each_loads_the_other() -> None:
    net = torchvision.models.resnet18(weights=None)
    converted = surgeon.convert(net, "octave", (1, 3, 64, 64), overrides=["rules[1].with.min_size=2"])
    assert sum(isinstance(m, OctaveConv) for m in converted.modules()) == 14
    before, after = net.state_dict(), converted.state_dict()
    assert {key: tensor.shape for key, tensor in before.items()} == {key: t.shape for key, t in after.items()}
    other = torchvision.models.resnet18(weights=None)
    converted.load_state_dict(other.state_dict())
    net.load_state_dict(converted.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in net.state_dict().items())


REFUSED = {
    "stride 3": (ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(3, 3)), {}, "stride 3x3"),
    "uneven stride": (ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 1)), {}, "stride 2x1"),
    "even kernel": (ConvSpec(8, 8, (2, 2)), {}, "kernel 2x2 has no centre"),
    "no padding": (ConvSpec(8, 8, (3, 3)), {}, "does not keep the size"),
    "no low input": (ConvSpec(3, 8, (1, 1)), {"alpha": 0.25}, "alpha 0.25 of 3 input channels leaves none"),
    "no low output": (ConvSpec(8, 1, (1, 1)), {}, "alpha 0.5 of 1 output channels leaves none"),
    "a cut group": (
        ConvSpec(8, 8, (1, 1), groups=2),
        {"alpha": 0.25},
        "2 low channels cut a group of 4 input channels",
    ),
    "other ranges with groups": (ConvSpec(8, 8, (1, 1), groups=2), {"low_in": ((0, 4),)}, "its groups cannot follow"),
    "ranges beyond the end": (ConvSpec(8, 8, (1, 1)), {"low_in": ((4, 9),)}, "low_in must lie within 8"),
    "ranges that leave nothing": (
        ConvSpec(8, 8, (1, 1)),
        {"low_in": ((0, 8),)},
        "low_in must lie within 8 input channels",
    ),
    "one pixel": (ConvSpec(8, 8, (3, 3), padding=(1, 1), padding_mode="reflect"), {}, "too wide for a low map of 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(case: str) -> None:
    spec, options, says = REFUSED[case]
    assert says in OctaveConv.refusal(spec, (2, 2), OctaveConvOptions.model_validate(options))


@pytest.mark.parametrize("low_in", [((5, 3),), ((0, 3), (2, 4)), ((3, 3),)])
def test_ranges_follow_each_other(low_in: object) -> None:
    with pytest.raises(ValueError, match="in ascending order, none of them empty"):
        OctaveConvOptions.model_validate({"low_in": low_in})


def test_not_everything_can_be_low() -> None:
    with pytest.raises(ValueError, match="alpha"):
        OctaveConvOptions.model_validate({"alpha": 1})


@pytest.mark.parametrize("groups", [1, 2])
def test_with_alpha_0_at_stride_1_it_is_the_conv_bit_for_bit(groups: int) -> None:
    conv = conv_of(ConvSpec(8, 12, (3, 5), padding=(1, 2), groups=groups)).float()
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        assert torch.equal(octave(conv, alpha=0)(x), conv(x))


def test_with_alpha_0_at_stride_2_it_is_pooling_and_the_conv_at_stride_1() -> None:
    conv = conv_of(ConvSpec(8, 12, (3, 3), padding=(1, 1), stride=(2, 2)))
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        assert relative(octave(conv, alpha=0)(x), F.conv2d(pooled(x), conv.weight, conv.bias, 1, 1)) <= 1e-15


def test_low_channels_may_lie_anywhere_in_the_input() -> None:
    """Sorting the channels of the input, and of the kernel, so that the low ones come last, is the usual case."""
    conv, ranges = conv_of(ConvSpec(9, 8, (3, 3), padding=(1, 1))), ((1, 3), (5, 7))
    order = [0, 3, 4, 7, 8, 1, 2, 5, 6]
    usual = copy.deepcopy(conv)
    usual.weight.data = conv.weight[:, order]
    x = torch.randn(2, 9, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(usual, x[:, order], 0.45, 0.5, "paper")
        assert relative(octave(conv, low_in=ranges, alpha_out=0.5)(x), expected) <= 1e-12


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_deployed_it_computes_the_same(case: Case, channels_last: bool) -> None:
    spec, options, size = case
    assume(OctaveConv.refusal(spec, size, OctaveConvOptions.model_validate(options)) is None)
    block = octave(conv_of(spec), **options)
    x = torch.randn(2, spec.c_in, *size, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = block(x).detach()
    for make in block.forms().values():
        deployed = make()
        deployed = deployed.to(memory_format=torch.channels_last) if channels_last else deployed
        assert relative(deployed(x), expected) <= 1e-12  # with gradients nothing is done in place
        with torch.no_grad():
            assert relative(deployed(x), expected) <= 1e-12
        assert {type(m) for m in deployed.modules()} <= {FusedOctave, StackedOctave, OctaveConv, nn.Conv2d}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_a_conv_costs_what_table_1_of_the_paper_says(alpha: float) -> None:
    conv = conv_of(ConvSpec(16, 16, (3, 3), padding=(1, 1), bias=False)).float()
    streams = [torch.zeros(1, count, side, side) for count, side in ((16 - int(16 * alpha), 32), (int(16 * alpha), 16))]
    with FlopCounterMode(display=False) as dense:
        conv(torch.zeros(1, 16, 32, 32))
    with FlopCounterMode(display=False) as thin:
        outs = octave(copy.deepcopy(conv), alpha=alpha).core(*streams)
    assert thin.get_total_flops() / dense.get_total_flops() == 1 - 0.75 * alpha * (2 - alpha)
    assert sum(t.numel() for t in outs) / (16 * 32 * 32) == 1 - 0.75 * alpha


PUBLISHED = {  # multiply-adds of known PyTorch code (exact), and as printed in the papers
    ("resnet50", 0.5): (2367143936, 0),
    ("resnet50", 0.125): (3.6e9, 0.05e9),
    ("resnet50", 0.25): (3.1e9, 0.05e9),
    ("resnet50", 0.75): (1.9e9, 0.05e9),
    ("resnet101", 0.5): (3.991e9, 0.0005e9),
    ("resnet152", 0.5): (5.615e9, 0.0005e9),
    ("mobilenet_v1", 0.5): (318.2e6, 0.05e6),
}
PARAMETERS = {"resnet50": 25557032, "mobilenet_v1": 4231976}


@pytest.mark.parametrize(("name", "alpha"), PUBLISHED)
def test_the_published_networks_cost_what_was_published(name: str, alpha: float) -> None:
    macs, tolerance = PUBLISHED[name, alpha]
    with torch.device("meta"):
        net = MobileNetV1() if name == "mobilenet_v1" else torchvision.models.get_model(name, weights=None)
    plan = surgeon.plan(net, "octave", (1, 3, 224, 224), overrides=[f"rules[1].with.alpha={alpha}"])
    # With few low channels it is cheaper to join them before the strided shortcut than to read them in two streams.
    assert len(plan.seams) == (name.startswith("resnet") and alpha <= 0.125)
    converted = surgeon.convert(net, plan).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        converted(torch.empty(1, 3, 224, 224, device="meta"))
    assert abs(counter.get_total_flops() // 2 - macs) <= tolerance
    assert plan.total.macs.after == counter.get_total_flops() // 2
    assert sum(p.numel() for p in converted.parameters()) == PARAMETERS.get(name, plan.total.params.before)


def test_from_the_command_line_it_is_approximate_trained_fused_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = SmallResNet()
    net.load_state_dict(data.weights())
    torch.save(net, "net.pt")
    assert run_surgeon("convert", "net.pt", "-r", "octave", "--input=1,1,28,28") == 0
    capsys.readouterr()
    assert run_surgeon("verify", "net.pt", "net.octave.pt", "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert sum(site["kind_b"] == "OctaveConv" for site in report["sites"]) == 5  # layer1 and layer2
    model = surgeon.load("net.octave.pt")
    images = data.images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        picked = torch.randperm(len(images.train_y))[:50]
        loss = F.cross_entropy(model.train()(images.train_x[picked]), images.train_y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    surgeon.save(model, "trained.pt")
    assert run_surgeon("fuse", "trained.pt", "--input=1,1,28,28") == 0
    assert run_surgeon("verify", "trained.pt", "trained.fused.pt") == 0
    fused = surgeon.load("trained.fused.pt")
    x = images.test_x[:9].double()
    with torch.no_grad():
        assert relative(fused.double().eval()(x), copy.deepcopy(model).double().eval()(x)) <= 1e-5
    fused.get_submodule("layer1.0.conv2.high_to_high").weight.data[0, 0, 0, 0] += 1e-6
    surgeon.save(fused.float(), "wrong.pt")
    assert run_surgeon("verify", "trained.pt", "wrong.pt") == 1
    surgeon.save(model, "trained.safetensors")
    again = surgeon.load("trained.safetensors", arch="net.pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(images.test_x[:9]), model.eval()(images.test_x[:9]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_and_keeps_channels_last(dtype: torch.dtype) -> None:
    block = octave(conv_of(ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 2)))).to(dtype)
    x = torch.randn(2, 8, 9, 8, dtype=dtype)
    with torch.no_grad():
        y = block(x)
        assert relative(torch.compile(block, backend="eager")(x), y) == 0
        last = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert relative(last, y) <= 4 * torch.finfo(dtype).eps
