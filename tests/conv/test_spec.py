"""ConvSpec against what torch's own Conv2d says and does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import relative
from torch import nn
from torch.nn import functional as F

from surgeon.conv.spec import ConvSpec, Pads, is_channels_last

CONVS: list[dict[str, object]] = [
    {"kernel_size": 3},
    {"kernel_size": (5, 2), "bias": False},
    {"kernel_size": 3, "stride": (2, 1), "padding": (0, 3)},
    {"kernel_size": (3, 1), "padding": 2, "dilation": (1, 3), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"kernel_size": (4, 2), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": (2, 6), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid", "stride": 3, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
]
quiet_about_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own
FIELDS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def conv_of(options: dict[str, object], **more: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **options, **more)  # type: ignore[arg-type]


@quiet_about_same
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_a_conv_built_from_its_spec_is_the_same_conv(options: dict[str, object]) -> None:
    conv = conv_of(options, dtype=torch.float64)
    built = ConvSpec.of(conv).build(like=conv.weight)
    assert type(built) is nn.Conv2d
    assert all(getattr(built, name) == getattr(conv, name) for name in FIELDS)
    assert ConvSpec.of(built) == ConvSpec.of(conv)
    built.load_state_dict(conv.state_dict())  # strict: no bias too many or too few
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert torch.equal(built(x), conv(x))


@quiet_about_same
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_pads_are_what_torch_pads(options: dict[str, object]) -> None:
    conv = conv_of(options, dtype=torch.float64)
    top, bottom, left, right = ConvSpec.of(conv).pads
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode)
    by_hand = F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    assert relative(by_hand, conv(x)) <= 1e-14


@pytest.mark.parametrize(
    ("kernel", "dilation", "pads"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1)),
        ((3, 5), (2, 1), (2, 2, 2, 2)),
        ((2, 3), (1, 1), (0, 1, 1, 1)),
        ((4, 2), (1, 3), (1, 2, 1, 2)),
    ],
)
def test_same_puts_the_odd_one_last(
    kernel: tuple[int, int], dilation: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    assert ConvSpec(1, 1, kernel, padding="same", dilation=dilation).pads == pads


def test_pads_know_whether_a_conv_could_do_them() -> None:
    assert Pads(1, 1, 0, 0).is_symmetric
    assert not Pads(1, 0, 0, 0).is_symmetric
    assert not Pads(1, 1, 0, 1).is_symmetric
    assert Pads(1, 1, -1, 0).is_crop
    assert not Pads(0, 0, 2, 0).is_crop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_build_follows_a_tensor(dtype: torch.dtype, device: str, memory_format: torch.memory_format) -> None:
    like = torch.empty(8, 4, 3, 3, dtype=dtype, device=device).to(memory_format=memory_format)
    built = ConvSpec(4, 8, (3, 3)).build(like=like)
    assert built.bias is not None
    assert {(p.dtype, p.device.type) for p in built.parameters()} == {(dtype, device)}
    assert built.weight.stride() == like.stride()


def test_build_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ConvSpec(4, 8, (3, 3)).build(like=torch.empty(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_of_takes_a_conv_that_was_changed_after_it_was_made() -> None:
    conv = conv_of({"kernel_size": 3})
    conv.bias, conv.stride = None, (2, 2)
    assert ConvSpec.of(conv) == ConvSpec(4, 8, (3, 3), stride=(2, 2), bias=False)


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_weight_shape_is_torchs(options: dict[str, object]) -> None:
    conv = conv_of(options)
    assert ConvSpec.of(conv).weight_shape == tuple(conv.weight.shape)


def test_depthwise_is_one_group_per_input_channel() -> None:
    assert ConvSpec(4, 8, (3, 3), groups=4).is_depthwise
    assert not ConvSpec(4, 8, (3, 3), groups=2).is_depthwise
    assert not ConvSpec(1, 8, (3, 3), groups=1).is_depthwise


def test_specs_compare_and_hash_by_value_and_do_not_change() -> None:
    spec = ConvSpec(4, 8, (3, 3))
    assert spec.change(bias=False) == ConvSpec(4, 8, (3, 3), bias=False)
    assert spec == ConvSpec(4, 8, (3, 3))
    assert len({spec, ConvSpec(4, 8, (3, 3)), spec.change(groups=2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bias = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ConvSpec(4, 8, (3, 3)), "4→8, 3x3"),
        (
            ConvSpec(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
            "4→8, 3x5, stride=2x1, padding=1x2, no bias",
        ),
        (
            ConvSpec(4, 4, (3, 3), padding="same", dilation=(2, 2), groups=4),
            "4→4, 3x3, padding=same, dilation=2, depthwise",
        ),
        (ConvSpec(4, 8, (3, 3), padding="valid", groups=2, padding_mode="reflect"), "4→8, 3x3, groups=2, mode=reflect"),
    ],
)
def test_a_spec_says_what_is_not_usual(spec: ConvSpec, text: str) -> None:
    assert str(spec) == text
    assert repr(spec) == f"ConvSpec({text})"


def test_channels_last_is_said_only_where_the_two_orders_differ() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert is_channels_last(x.to(memory_format=torch.channels_last))
    assert not is_channels_last(x)
    assert not is_channels_last(torch.empty(2, 1, 4, 5).to(memory_format=torch.channels_last))  # one order serves both
    assert not is_channels_last(torch.empty(3))
